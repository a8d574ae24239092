for (const svg of document.querySelectorAll('svg[data-lines]')) {
  const data = JSON.parse(svg.dataset.lines), [x0, x1, left, right] = data.frame;
  const make = (name, attributes) => {
    const node = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return svg.appendChild(node);
  };
  let cursor, text;
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * 640;
    if (px < left || px > right) return;
    const x = x0 + (px - left) / (right - left) * (x1 - x0);
    cursor ??= make('line', {class: 'cursor', y1: 12, y2: 222});
    text ??= make('text', {class: 'read', y: 24});
    cursor.setAttribute('x1', px); cursor.setAttribute('x2', px);
    const near = points => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    text.setAttribute('x', px > 320 ? px - 8 : px + 8);
    text.setAttribute('text-anchor', px > 320 ? 'end' : 'start');
    text.textContent = data.x + ' ' + Math.round(x) + '  ' +
      data.lines.map(([name, points]) => name + ' ' + near(points)[1]).join('  ');
  });
  svg.addEventListener('pointerleave', () => { cursor?.remove(); text?.remove(); cursor = text = undefined; });
}
