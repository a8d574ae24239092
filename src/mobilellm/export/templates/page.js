// The page: what the user sees and presses. The engine above it gives `openEngine`. All text of the model and of its template
// enters the page as text (textContent), and a special token that the user spells out stays text, too.
const seen = id => document.getElementById(id);
const facts = JSON.parse(seen('facts').textContent);
const history = [];
let engine, stopper;

// A prompt is strings and ids of special tokens. What the strings spell is text, whatever it is: `spelled` sees to that.
function joined(pieces) {
  const found = [];
  for (const piece of pieces) {
    if (piece === '') continue;
    if (typeof piece === 'string' && typeof found.at(-1) === 'string') found[found.length - 1] += piece;
    else found.push(piece);
  }
  return found;
}

function promptOf(text) {
  const pieces = joined([...facts.begin, text]);
  return pieces.length ? pieces : facts.alone;
}

// A prompt as one text, which is what the engines take: there the spelling of a special token is that token. One that is spelled in
// what is text gets a word joiner, which nobody sees, after its first letter.
function spelled(pieces) {
  const names = new Map(facts.specials.map(([text, id]) => [id, text]));
  const spellings = [...names.values()].sort((a, b) => b.length - a.length).map(text => text.replace(/[.*+?^${}()|[\]\\\/]/g, '\\$&'));
  const special = spellings.length ? new RegExp(spellings.join('|'), 'g') : null;
  const plain = text => special ? text.replace(special, found => found[0] + '\u2060' + found.slice(1)) : text;
  return pieces.map(piece => typeof piece === 'string' ? plain(piece) : names.get(piece)).join('');
}

function chatOf(messages, system) {
  const {head, reply, next, ask, trim} = facts.turns, told = trim ? system.trim() : system;
  const pieces = told ? [...facts.turns.system[0], told, ...facts.turns.system[1]] : [...head];
  messages.forEach(({role, content}, number) => {
    const text = trim ? content.trim() : content, last = number === messages.length - 1;
    pieces.push(text, ...(role === 'assistant' ? next : last ? ask : reply));
  });
  const all = joined(pieces);
  return all.some(Number.isInteger) ? all : joined([...facts.begin, ...all]);
}

const chatting = () => document.querySelector('input[name=mode]:checked')?.value === 'chat';

function label() {
  const chat = chatting();
  seen('asks').textContent = chat ? 'Message' : 'Text to continue';
  seen('go').textContent = chat ? 'Send' : 'Write';
  seen('keys').textContent = chat ? 'Enter sends, Shift+Enter begins a line, Escape stops.' : 'Ctrl+Enter writes, Escape stops.';
}

function paragraph(kind, text) {
  const made = seen('log').appendChild(document.createElement('p'));
  made.className = kind;
  made.textContent = text;
  return made;
}

function alarm(text) {
  seen('alarm').textContent = text;
  seen('alarm').hidden = !text;
}

function busy(on) {
  seen('log').setAttribute('aria-busy', on);
  for (const [id, off] of [['go', on], ['stop', !on], ['clear', on]]) seen(id).disabled = off;
  for (const input of document.getElementsByName('mode')) input.disabled = on;
  if (on && document.activeElement === document.body) seen('stop').focus();
}

function settings() {
  const value = id => seen(id).valueAsNumber;
  const seed = Number.isNaN(value('seed')) ? crypto.getRandomValues(new Uint32Array(1))[0] : value('seed');
  return {temperature: value('temperature'), top_p: value('top_p'), tokens: value('tokens'), seed};
}

async function write() {
  if (!engine || stopper || !seen('ask').reportValidity()) return;
  const chat = chatting(), text = seen('prompt').value, chosen = settings(), log = seen('log');
  if (chat && !text.trim()) return;
  alarm('');
  let pieces, shown, before = '';
  if (chat) {
    paragraph('own', text);
    history.push({role: 'user', content: text});
    pieces = chatOf(history, seen('system')?.value ?? '');
    shown = paragraph('model', '');
    seen('prompt').value = '';
  } else {
    log.replaceChildren();
    pieces = promptOf(text);
    shown = paragraph('model', '');
    shown.appendChild(document.createElement('b')).textContent = text;
    before = text;
  }
  const target = shown.appendChild(document.createTextNode(''));
  const focused = document.activeElement;
  stopper = new AbortController();
  busy(true);
  seen('status').textContent = 'The model writes.';
  const began = performance.now();
  let count = 0, first = 0, end = {};
  try {
    end = await engine.write(pieces, chosen, piece => {
      if (!count++) first = performance.now();
      target.data += piece;
      log.scrollTop = log.scrollHeight;
      const seconds = (performance.now() - first) / 1000;
      const speed = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens a second` : '';
      seen('figures').textContent = `first token ${(first - began).toFixed(0)} ms${speed}`;
    }, stopper.signal);
  } catch (error) {
    if (!stopper.signal.aborted) alarm(said(error));
  }
  stopper = null;
  count = end.tokens ?? count;
  busy(false);
  if (chat) history.push({role: 'assistant', content: target.data});
  seen('clear').disabled = false;
  seen('status').textContent = `${count} tokens, ${seen('figures').textContent}, seed ${chosen.seed}.`;
  seen('figures').title = `${count} tokens, seed ${chosen.seed}`;
  if (focused === seen('prompt') || document.activeElement === document.body) seen('prompt').focus();
  globalThis.written = {text: target.data, before, pieces, count, reason: end.reason, first_ms: first - began, at: first, seed: chosen.seed,
    tokens_per_second: (count - 1) / ((performance.now() - first) / 1000)};
}

function said(error) {
  const text = String(error?.message ?? error);
  return /context|n_ctx|exceed/i.test(text) ? `This is longer than the model's ${facts.context} tokens: shorten it, or start over. (${text})` : text;
}

seen('ask').addEventListener('submit', event => { event.preventDefault(); write(); });
// A setting that is out of range is shown, also where settings are folded away.
seen('ask').addEventListener('invalid', event => { const folded = event.target.closest('details'); if (folded) folded.open = true; }, true);
seen('stop').addEventListener('click', () => stopper?.abort());
seen('clear').addEventListener('click', () => {
  history.length = 0;
  seen('log').replaceChildren();
  seen('figures').textContent = seen('status').textContent = '';
  alarm('');
  seen('clear').disabled = true;
  seen('prompt').focus();
});
seen('prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.isComposing) return;
  if (chatting() ? !event.shiftKey : event.ctrlKey || event.metaKey) { event.preventDefault(); write(); }
});
document.addEventListener('keydown', event => { if (event.key === 'Escape') stopper?.abort(); });
for (const input of document.getElementsByName('mode')) input.addEventListener('change', () => { seen('clear').click(); label(); input.focus(); });
label();
if (!facts.turns) seen('prompt').value = facts.opening;

try {
  engine = await openEngine(facts, part => { seen('progress').value = part; });
  seen('loading').hidden = true;
  seen('runs').textContent = engine.name;
  seen('go').disabled = false;
  seen('status').textContent = 'The model is ready.';
  globalThis.ready = performance.now();
} catch (error) {
  seen('loading').hidden = true;
  alarm(`The model could not be loaded: ${error?.message ?? error}`);
  globalThis.failed = String(error?.stack ?? error);
}
