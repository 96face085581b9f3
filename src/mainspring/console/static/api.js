// The server's API: one streamed chat completion, and the live figures.

/** An answer of the server that is an error. `code` is OpenAI's, such as "context_length_exceeded". */
export class ApiError extends Error {
  constructor(status, detail) {
    super(detail?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.code = detail?.code ?? null;
  }
}

/** The server could not be reached, or the connection broke. */
export class ConnectionError extends Error {}

/** Yields the chunks of a streamed chat completion. Throws ApiError, ConnectionError, or AbortError. */
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new ApiError(response.status, await errorDetail(response));
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error);
    yield chunk;
  }
  throw new ConnectionError("The connection ended before the answer did.");
}

/** The live figures. Throws ApiError or ConnectionError. */
export async function fetchFigures() {
  const response = await request("/console/stats", { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new ApiError(response.status, await errorDetail(response));
  return response.json();
}

// The key of a server that asks for one; kept for this tab only.
const KEY = "mainspring-api-key";
let declined = false;

/** The answer to a request; where the server needs a key, the user is asked for it once. */
async function request(path, options) {
  const used = sessionStorage.getItem(KEY);
  const response = await send(path, options, used);
  if (response.status !== 401) return response;
  // Another request may have asked meanwhile.
  if (sessionStorage.getItem(KEY) === used && !askForKey()) return response;
  return send(path, options, sessionStorage.getItem(KEY));
}

function askForKey() {
  const key = declined ? null : window.prompt("This server needs an API key.");
  if (!key) {
    declined = true;
    return false;
  }
  sessionStorage.setItem(KEY, key);
  return true;
}

async function send(path, options, key) {
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionError("The server does not answer.");
  }
}

async function errorDetail(response) {
  try {
    return (await response.json()).error;
  } catch {
    return null;
  }
}

/** The data of each server-sent event in a body of bytes. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      pending += value;
      let end;
      while ((end = pending.indexOf("\n\n")) >= 0) {
        const event = pending.slice(0, end);
        pending = pending.slice(end + 2);
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    throw new ConnectionError("The connection to the server broke.");
  }
}
