// What the server says, for the page: HTTP, server-sent events, errors in words.
// Knows nothing of the document, and nothing of what the chunks of an answer mean.

/** The server said no. `status` is HTTP's, 0 if the refusal came inside a stream. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The connection could not be made, or ended before the answer did. */
export class Disconnected extends Error {}

/**
 * Server-sent events out of text that may be cut anywhere: inside a line, between CR and LF.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 */
export class EventParser {
  #parts = []; // of the line that is unfinished
  #data = []; // lines of the event that is unfinished
  #name = "";
  #skipsLineFeed = false; // the last text ended in CR, which ended the line
  #isFirst = true;

  /** The events that this text completes, as {name, data}. */
  *push(text) {
    if (text === "") return;
    let start = 0;
    if (this.#isFirst && text[0] === "\uFEFF") start = 1;
    if (this.#skipsLineFeed && text[0] === "\n") start = 1;
    this.#isFirst = false;
    this.#skipsLineFeed = text.endsWith("\r");

    const ends = /\r\n|\r|\n/g;
    ends.lastIndex = start;
    for (let end = ends.exec(text); end !== null; end = ends.exec(text)) {
      this.#parts.push(text.slice(start, end.index));
      start = ends.lastIndex;
      const line = this.#parts.join("");
      this.#parts = [];
      const event = this.#take(line);
      if (event !== null) yield event;
    }
    this.#parts.push(text.slice(start));
  }

  #take(line) {
    if (line === "") return this.#finish();

    const colon = line.indexOf(":");
    if (colon === 0) return null; // a comment, as servers send to keep a connection open
    const field = colon === -1 ? line : line.slice(0, colon);
    const value = colon === -1 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "event") this.#name = value;
    return null;
  }

  #finish() {
    const event = { name: this.#name || "message", data: this.#data.join("\n") };
    const isEmpty = this.#data.length === 0;
    this.#data = [];
    this.#name = "";
    return isEmpty ? null : event;
  }
}

/** The name of the model that the server serves. */
export async function modelName(key) {
  const response = await ask("v1/models", { headers: headersFor(key) });
  const { data } = await response.json();
  return data[0].id;
}

/** The chunks of an answer, one by one. Throws Refused, Disconnected, or an AbortError. */
export async function* chunksOf(request, key, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headersFor(key), "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const type = response.headers.get("Content-Type") ?? "nothing";
  if (!type.startsWith("text/event-stream")) {
    throw new Refused(response.status, `The server sent ${type} where a stream was expected.`);
  }

  for await (const event of eventsOf(response.body)) {
    if (event.data === "[DONE]") return;
    const chunk = parsed(event.data);
    const error = chunk.error ?? (event.name === "error" ? chunk : null);
    if (error !== null) throw new Refused(0, wordsOf(error));
    yield chunk;
  }
  throw new Disconnected("The connection broke before the answer was complete.");
}

async function* eventsOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // of a broken stream there is nothing to cancel
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Disconnected("The connection broke before the answer was complete.");
  }
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Disconnected("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  throw new Refused(response.status, await refusalOf(response));
}

function headersFor(key) {
  return key === "" ? {} : { Authorization: `Bearer ${key}` };
}

async function refusalOf(response) {
  const text = await response.text().catch(() => "");
  let said = `The server answered with status ${response.status}.`;
  try {
    said = wordsOf(JSON.parse(text).error ?? {});
  } catch {
    // not the API's own error, but a proxy's page, say: its status is all that can be told
  }
  const seconds = Number(response.headers.get("Retry-After"));
  if (seconds > 0) said += ` Try again in ${seconds} s.`;
  return said;
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Refused(0, "The server sent something that is not an answer.");
  }
}

/** The message of an error object, as a sentence. */
function wordsOf(error) {
  const message = typeof error.message === "string" ? error.message.trim() : "";
  if (message === "") return "The server gave no reason.";
  const sentence = message[0].toUpperCase() + message.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}
