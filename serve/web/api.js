// The way to the server: JSON, files, and the events of one video. See docs/serving.md.

const KEY = "arlon.key";
/** What happens to a video last: as an event, or as its status. */
export const LAST = ["completed", "failed", "deleted"];
const base = new URL("v1/", document.baseURI);
/** Pauses between tries to reach the server again, in milliseconds. */
export const FIRST_PAUSE = 500;
export const longer = (pause) => Math.min(2 * pause, 10000);
export const wait = (ms, signal) =>
  new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
  });

/** Without a byte for so long, a connection may be one that nobody told this end of: events have a comment sooner. */
const QUIET_MS = 45000;
/** What the reader reads next; null where nothing comes for so long, and `pending` is to be asked again. */
export async function readWithin(pending) {
  let timer;
  const quiet = new Promise((done) => (timer = setTimeout(done, QUIET_MS, null)));
  return Promise.race([pending, quiet]).finally(() => clearTimeout(timer));
}

export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

// of this tab alone, and gone with it
export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY));

let ask = async () => false;
/** `question` is asked for a key where the server wants one; it resolves to whether there is one now. */
export const onKeyNeeded = (question) => (ask = question);
let asking = null;

export const kindOf = (id) => (id.startsWith("draft_") ? "drafts" : "videos");
export const pathOf = (id, rest = "") => `${kindOf(id)}/${encodeURIComponent(id)}${rest}`;

/** fetch of a path below /v1/ with the key. Raises ApiError, after asking for a key where one is needed. */
export async function request(path, { headers = {}, ...options } = {}) {
  for (;;) {
    const used = key();
    const authorization = used ? { Authorization: `Bearer ${used}` } : {};
    let response;
    try {
      response = await fetch(new URL(path, base), { ...options, headers: { ...headers, ...authorization } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server cannot be reached." });
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (used !== key()) continue; // another request has brought a new key meanwhile
      asking ??= ask(Boolean(used)).finally(() => (asking = null));
      if (await asking) continue;
    }
    throw await errorOf(response);
  }
}

async function errorOf(response) {
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch {
    // not the API's own answer: a proxy's, perhaps
  }
  const message = found.message ?? `The server answered ${response.status}.`;
  return new ApiError(response.status, { ...found, message });
}

/** Whether it is no use to ask again. */
export const isFinal = (error) => error instanceof ApiError && error.status && error.status < 500 && error.status !== 429;

export async function call(method, path, body) {
  const json = { "Content-Type": "application/json" };
  const response = await request(path, { method, ...(body && { headers: json, body: JSON.stringify(body) }) });
  return response.json();
}

const NEW_MS = 2000;
let pass = null; // {of: a key, value, since, until}
let passAsked = null;

async function currentPass() {
  if (pass?.of === key() && Date.now() < pass.until) return pass.value;
  passAsked ??= askForPass().finally(() => (passAsked = null));
  return passAsked;
}

async function askForPass() {
  const of = key(); // it may be another one when the answer is there
  const { value, expires_in } = await call("POST", "passes");
  const since = Date.now();
  pass = { of, value, since, until: since + expires_in * 500 }; // half of its time: what is begun with it goes on
  return value;
}

/** An address for <img>, <video> and downloads: these can send no key, so it has a pass where there is one. */
export async function mediaUrl(path) {
  const url = new URL(path, base);
  if (key()) url.searchParams.set("pass", await currentPass());
  return url.href;
}

/** Whether the pass in `url` is good no longer; then `mediaUrl` gives another one. */
export async function passIsOver(url) {
  const used = new URL(url).searchParams.get("pass");
  if (used !== pass?.value) return used !== null; // there is another one by now
  if (!used || Date.now() - pass.since < NEW_MS) return false; // or one after another would be asked for
  const { status } = await fetch(url, { method: "HEAD" });
  if (status === 401) pass = null;
  return status === 401;
}

/**
 * Tells `onEvent(type, data)` what happens to a video until it has ended or `signal` is aborted. `seen.id` is the last
 * event that was read: after a lost connection, or in another call, only what came later is told.
 * Raises ApiError where there is nothing to watch.
 */
export async function watch(id, onEvent, { signal, seen = {} }) {
  for (let pause = FIRST_PAUSE; !signal.aborted; pause = longer(pause)) {
    try {
      const headers = { Accept: "text/event-stream", ...(seen.id && { "Last-Event-ID": seen.id }) };
      const response = await request(pathOf(id, "/events"), { headers, signal, cache: "no-store" });
      let told = false;
      for await (const event of eventsOf(response.body)) {
        pause = FIRST_PAUSE;
        told = true;
        // a draft of which a segment was planned anew goes on behind its end
        if (event.id) Object.assign(seen, { id: event.id, ended: LAST.includes(event.type) });
        onEvent(event.type, event.data);
      }
      if (seen.ended || (!told && LAST.includes((await call("GET", pathOf(id))).status))) return;
    } catch (error) {
      if (signal.aborted) return;
      if (isFinal(error)) throw error;
    }
    await wait(pause, signal);
  }
}

/** The events in a stream of bytes. EventSource would read them too, but it cannot send a key. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { type: "message", data: "", id: "" };
  for (;;) {
    const read = await readWithin(reader.read());
    if (!read) {
      reader.cancel().catch(() => {});
      throw new ApiError(0, { message: "The server is silent." });
    }
    if (read.done) return;
    const lines = (rest + read.value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data) yield { ...event, data: JSON.parse(event.data) };
        event = { type: "message", data: "", id: "" };
        continue;
      }
      const [, name, text] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (name === "event") event.type = text;
      else if (name === "id") event.id = text;
      else if (name === "data") event.data += text;
    }
  }
}
