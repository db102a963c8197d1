// What the page asks of the server: models, a streamed answer, the load.  All by relative addresses.

/** What went wrong, in words for the user; `param` is the setting that the server names, if any. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

const AWAY = "The server cannot be reached. Is it still running?";
const CUT_OFF = "The server went away in the middle of this answer; what had arrived is kept.";

/** A value that lives as long as this tab; nowhere, where the browser forbids to store. */
export const stored = {
  get(name) {
    try {
      return sessionStorage.getItem(`compress.${name}`);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(`compress.${name}`, value);
    } catch {
      // No storage, or it is full: the value is gone with the next reload, and nothing else is.
    }
  },
};

async function request(path, options = {}) {
  const key = stored.get("key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A key of other characters than a header can hold never left the browser.
    if (key && /[^\x20-\x7e]/.test(key)) {
      throw new ServerError("This API key has characters that cannot be sent.", { status: 401 });
    }
    throw new ServerError(AWAY);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error, () => null);
  let message = error?.message ?? `The server answered with status ${response.status}.`;
  const seconds = Number(response.headers.get("Retry-After"));
  if (seconds > 0) message += ` Try again in ${seconds} s.`;
  return new ServerError(message, { status: response.status, param: error?.param });
}

/** Names of the models that the server has. */
export async function listModels() {
  const { data } = await (await request("v1/models")).json();
  return data.map((model) => model.id);
}

const STATES = {
  loading: "The model is being loaded.",
  draining: "The server is shutting down.",
  fault: "The server's engine has failed; its log says why.",
};

/** Ends once the server has its model; until then `onWait` gets the reason, again and again. */
export async function untilReady(onWait) {
  for (;;) {
    const response = await fetch("ready", { cache: "no-store" }).catch(() => null);
    if (response && response.status !== 503) return;
    const state = await response?.json().catch(() => null);
    onWait(response ? (STATES[state?.status] ?? "The server is not ready.") : AWAY);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

const USAGE = { include_usage: true, continuous_usage_stats: true }; // counts in every chunk

/** The chunks of an answer, as objects.  Throws ServerError, or an AbortError after an abort. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: USAGE }),
    signal,
  });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, { param: chunk.error.param });
    yield chunk;
  }
  throw new ServerError(CUT_OFF);
}

/** The data of each server-sent event. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new ServerError(CUT_OFF);
    }
    if (read.done) return;
    const lines = (rest + decoder.decode(read.value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

/** Shares and counts from the server's metrics, summed over engines (the share: their mean). */
export async function readLoad() {
  const text = await (await request("metrics")).text();
  const values = (name) =>
    [...text.matchAll(new RegExp(`^compress:${name}(?:\\{.*\\})? (\\S+)`, "gm"))].map((found) => Number(found[1]));
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const shares = values("kv_cache_usage_perc");
  if (!shares.length) return null;
  return {
    kv: sum(shares) / shares.length,
    running: sum(values("num_requests_running")),
    waiting: sum(values("num_requests_waiting")),
  };
}
