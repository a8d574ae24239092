// The engine of the page: transformers.js on onnxruntime, by WebGPU where the browser has it, else by WebAssembly. Engine and model
// lie in the folder of the page.

// Numbers from 0 to 1 that a seed repeats (mulberry32).
function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// One token of logits, as the page's other engine and the toolkit draw it: temperature, then the fewest likeliest that reach top_p.
function drawn(logits, {temperature, top_p}, random) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 1e-30)) return best;
  const weights = Float64Array.from(logits, x => Math.exp((x - logits[best]) / temperature));
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
  const total = weights.reduce((sum, x) => sum + x, 0);
  let kept = 0, mass = 0;
  while (kept < order.length && (kept === 0 || mass < top_p * total)) mass += weights[order[kept++]];
  let left = random() * mass;
  for (let i = 0; i < kept; i++) if ((left -= weights[order[i]]) < 0) return order[i];
  return order[kept - 1];
}

async function hasWebGPU() {
  try { return !!(await navigator.gpu?.requestAdapter()); } catch { return false; }
}

async function openEngine(facts, progress) {
  const here = new URL('./', location);
  const {env, AutoTokenizer, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, InterruptableStoppingCriteria, Tensor, TextStreamer} =
    await import(new URL('engine/transformers.min.js', here));
  Object.assign(env, {allowRemoteModels: false, allowLocalModels: true, localModelPath: here.pathname, useBrowserCache: false});
  env.backends.onnx.wasm.wasmPaths = new URL('engine/', here).href;
  const tokenizer = await AutoTokenizer.from_pretrained('model');
  const progress_callback = told => { if (told.file?.endsWith('.onnx') && told.total) progress(0.95 * told.loaded / told.total); };
  const open = device => AutoModelForCausalLM.from_pretrained('model', {dtype: facts.dtype, device, progress_callback});
  let device = facts.gpu && await hasWebGPU() ? 'webgpu' : 'wasm', model;
  try {
    model = await open(device);
  } catch (error) {
    if (device === 'wasm') throw error;
    model = await open(device = 'wasm');
  }
  progress(1);

  // It leaves one token that can come next, so that the seed alone decides.
  class Draw extends LogitsProcessor {
    constructor(settings) { super(); this.settings = settings; this.random = randomFrom(settings.seed); }
    _call(ids, logits) {
      const values = logits.data, chosen = drawn(values, this.settings, this.random);
      values.fill(-Infinity);
      values[chosen] = 0;
      return logits;
    }
  }

  const ends = new Set(facts.ends);
  return {
    name: device === 'webgpu' ? 'onnxruntime, WebGPU' : 'onnxruntime, WebAssembly',
    async write(pieces, settings, show, signal) {
      const ids = tokenizer.encode(spelled(pieces), {add_special_tokens: false}), room = facts.context - ids.length;
      if (room < 1) throw new Error(`${ids.length} tokens exceed the context of ${facts.context}`);
      const most = Math.min(settings.tokens, room), stopping = new InterruptableStoppingCriteria();
      const interrupt = () => stopping.interrupt();
      signal.addEventListener('abort', interrupt);
      let text = '', shown = 0, tokens = 0, stopped = false;
      const streamer = new TextStreamer(tokenizer, {
        skip_prompt: true, skip_special_tokens: true,
        token_callback_function: made => { for (const id of made) if (!ends.has(Number(id))) tokens++; },
        callback_function: piece => {
          if (stopped) return;
          text += piece;
          const cuts = facts.stop.map(stop => text.indexOf(stop)).filter(at => at >= 0);
          if (cuts.length) { stopped = true; interrupt(); text = text.slice(0, Math.min(...cuts)); }
          if (text.length > shown) show(text.slice(shown));
          shown = text.length;
        },
      });
      try {
        const shape = [1, ids.length];
        await model.generate({
          input_ids: new Tensor('int64', BigInt64Array.from(ids, BigInt), shape),
          attention_mask: new Tensor('int64', new BigInt64Array(ids.length).fill(1n), shape),
          max_new_tokens: most, do_sample: false, eos_token_id: facts.ends.length ? facts.ends : [-1],
          logits_processor: Object.assign(new LogitsProcessorList(), {processors: [new Draw(settings)]}),
          stopping_criteria: stopping, streamer,
        });
      } finally {
        signal.removeEventListener('abort', interrupt);
      }
      return {tokens: tokens, reason: tokens >= most ? 'length' : 'stop'};
    },
  };
}
