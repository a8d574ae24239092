// The engine of the page: llama.cpp by wllama. Its parts lie in the page as base64, or beside it where the page is a folder; all but
// the model are gzipped.
const NOT_READ = 'wllama.wasm'; // an address that the engine wants to be told; what it would read there it is sent

async function beside(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function partOf(element) {
  const text = element.textContent;
  element.remove();
  // Older browsers read base64 from an address alone, ten times as slowly.
  if (Uint8Array.fromBase64) return new Blob([Uint8Array.fromBase64(text)]);
  return (await fetch('data:application/octet-stream;base64,' + text)).blob();
}

async function unpacked(id) {
  const packed = facts.beside ? await (await beside(`engine/${id}.gz`)).blob() : await partOf(document.getElementById(id));
  return new Response(packed.stream().pipeThrough(new DecompressionStream('gzip')));
}

async function compiled(id) {
  return WebAssembly.compile(await (await unpacked(id)).arrayBuffer());
}

// A worker that is sent the compiled engine before all else: one of a page from file:// may read no file.
function workerWith(engine) {
  return class extends Worker {
    constructor(...options) {
      super(...options);
      this.postMessage({compiled: engine});
    }
  };
}

function has64BitMemory() {
  try { return !!new WebAssembly.Memory({address: 'i64', initial: 1n}); } catch { return false; }
}

// The engine itself adds what a prompt begins with.
function promptText(pieces, facts) {
  return spelled(facts.begin.length && pieces[0] === facts.begin[0] ? pieces.slice(1) : pieces);
}

async function modelWithin(progress) {
  const parts = [...document.querySelectorAll('script.model')], blobs = [];
  for (const part of parts) {
    blobs.push(await partOf(part));
    progress(blobs.length / (parts.length + 1));
  }
  return blobs;
}

async function modelBeside(progress) {
  const answer = await beside('model.gguf'), reader = answer.body.getReader(), blobs = [];
  const size = Number(answer.headers.get('content-length'));
  for (let had = 0; ;) {
    const {done, value} = await reader.read();
    if (done) return blobs;
    blobs.push(new Blob([value]));
    had += value.length;
    if (size) progress(0.95 * had / size);
  }
}

async function openEngine(facts, progress) {
  if (!globalThis.WebAssembly || !globalThis.DecompressionStream) throw new Error('this browser is too old for it (it lacks WebAssembly or DecompressionStream)');
  // Chromium and Firefox have what the faster build needs; all others take the one that needs less.
  const firefox = navigator.userAgent.includes('Firefox/');
  const fast = has64BitMemory() && (firefox || !!WebAssembly.Suspending);
  const compiling = compiled(fast ? 'wasm' : 'wasm-compat');
  const code = await (await unpacked('engine')).text();
  const {Wllama} = await import(URL.createObjectURL(new Blob([code], {type: 'text/javascript'})));
  const blobs = facts.beside ? await modelBeside(progress) : await modelWithin(progress);
  const silent = () => {};
  const llama = new Wllama({default: NOT_READ}, {
    suppressNativeLog: true, allowOffline: true, logger: {debug: silent, log: silent, warn: silent, error: console.error},
  });
  llama.setCompat(fast ? null : {worker: {code: await (await unpacked('worker-compat')).text()}, wasm: NOT_READ});
  for (const id of ['wasm', 'wasm-compat', 'worker-compat']) document.getElementById(id)?.remove();
  const plain = globalThis.Worker;
  globalThis.Worker = workerWith(await compiling);
  try {
    await llama.loadModel([new Blob(blobs)], {n_ctx: facts.context, n_gpu_layers: 0, n_threads: 1, n_parallel: 1, warmup: false});
  } finally {
    globalThis.Worker = plain;
  }
  progress(1);
  return {
    name: fast ? 'wllama' : 'wllama, compatible build',
    async write(pieces, settings, show, signal) {
      const end = {};
      await llama.createCompletion({
        prompt: promptText(pieces, facts),
        max_tokens: settings.tokens, temperature: settings.temperature, top_p: settings.top_p, seed: settings.seed,
        top_k: 0, min_p: 0, repeat_penalty: 1, samplers: ['temperature', 'top_p'], stop: facts.stop, cache_prompt: true,
        stream: true, abortSignal: signal,
        onData: chunk => {
          const choice = chunk.choices?.[0];
          if (choice?.finish_reason) Object.assign(end, {reason: choice.finish_reason, tokens: chunk.usage?.completion_tokens});
          else if (choice) show(choice.text);
        },
      });
      return end;
    },
  };
}
