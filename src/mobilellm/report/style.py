"""The report's stylesheet, and the script that shows a chart's figures under the pointer."""

STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1d1f23;--soft:#6a6f78;--line:#e4e2dd;--own:#1f6feb;
--c1:#1f6feb;--c2:#d1495b;--c3:#2a9d8f;--c4:#8a6fdf;--c5:#c58b1b}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e23;--ink:#e8e6e1;--soft:#9aa0aa;--line:#2d3138;--own:#6ea8ff;
--c1:#6ea8ff;--c2:#ff7d8d;--c3:#57cdbd;--c4:#b19cff;--c5:#e8b74e}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
header p{margin:0;color:var(--soft)}
h1{margin:0;font-size:2.2rem;letter-spacing:-.02em}
h2{margin:44px 0 14px;font-size:1.2rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:24px}
.tiles div,.chart,.sample,
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0}
.tiles strong{display:block;font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{display:block}
.tiles small,figcaption,caption,.chart small{color:var(--soft);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px}
.charts .chart:first-child{grid-column:1/-1}
.chart figcaption b{color:var(--ink);font-size:1rem}
.chart svg{display:block;width:100%;height:auto;margin-top:6px;overflow:visible}
.chart text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.faint{stroke-width:1;opacity:.35}
.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
circle.c2{fill:var(--card);stroke-width:2}
.legend{float:right}.legend span{margin-left:14px;white-space:nowrap}
.legend i{display:inline-block;width:18px;border-top:3px solid;margin-right:6px;vertical-align:middle}
.legend .c1{color:var(--c1)}.legend .c2{color:var(--c2)}.legend .c3{color:var(--c3)}.legend .c4{color:var(--c4)}
.legend .c5{color:var(--c5)}.legend .faint{opacity:.35}
.cursor{stroke:var(--soft);stroke-dasharray:3 3}
.read{fill:var(--ink)!important;font-weight:600}
table{border-collapse:collapse;width:100%}
caption{text-align:left;padding-bottom:8px}
th,td{text-align:left;padding:6px 10px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;font-weight:400;
overflow-wrap:anywhere}
th{color:var(--soft);width:15rem;overflow-wrap:normal}
.bars td:last-child{width:4.5rem;text-align:right;font-variant-numeric:tabular-nums}
.bars td,.bars th{border:0;vertical-align:middle;padding:4px 10px 4px 0}
.bars div{height:18px;border-radius:4px;background:var(--soft);opacity:.45}
.bars .own th,.bars .own td:last-child{color:var(--ink);font-weight:700}
.bars .own div{background:var(--own);opacity:1}
.sample{margin-bottom:12px}
blockquote{margin:0 0 8px;white-space:pre-wrap;overflow-wrap:anywhere;font-family:Georgia,"Times New Roman",serif}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;overflow-x:auto;margin:4px 0 14px;
font-size:.88rem}
section>p{margin:0}
details{margin-top:16px}summary{cursor:pointer;font-weight:600}
@media (max-width:520px){th{width:8.5rem}.legend{float:none;display:block}.legend span{margin:0 14px 0 0}}
"""

SCRIPT = """
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
"""
