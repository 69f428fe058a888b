// Shows a video while it is made: what arrives of the growing mp4 is handed to the player at once.
// A plain <video src> shows nothing before tens of kilobytes are there, which is more than a short segment has; and it
// can send no key.

import { mediaUrl, passIsOver, pathOf } from "./api.js";
import { bytesOf } from "./stream.js";

const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource;
const KEEP_S = 20; // of what was played already, where the browser has no room for more
const once = (target, name) => new Promise((done) => target.addEventListener(name, done, { once: true }));

/** The codec of an mp4 that begins with `bytes`, as in `avc1.64000a`: null while its headers are not all there. */
export function codecOf(bytes) {
  for (let at = 4; at + 8 <= bytes.length; at++) {
    if (String.fromCharCode(...bytes.subarray(at, at + 4)) !== "avcC") continue;
    const profile = bytes.subarray(at + 5, at + 8);
    return `avc1.${[...profile].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  }
  return null;
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

export class Player {
  #video;
  #source = null; // the address of what the stream is read into
  #stop = new AbortController();

  constructor(video) {
    this.#video = video;
  }

  /** Nothing is shown, and what was being fetched is not fetched any more. */
  clear() {
    this.#stop.abort();
    this.#stop = new AbortController();
    this.#video.onerror = null;
    this.#video.removeAttribute("src");
    this.#video.load();
    this.#release();
  }

  #show(url) {
    this.#video.src = url;
    this.#release();
    if (url.startsWith("blob:")) this.#source = url;
  }

  #release() {
    if (this.#source) URL.revokeObjectURL(this.#source);
    this.#source = null;
  }

  /** A finished file; it goes on where the player was. Raises ApiError. */
  async file(id) {
    this.#stop.abort();
    this.#stop = new AbortController();
    const { signal } = this.#stop;
    const url = await mediaUrl(pathOf(id, "/content"));
    if (signal.aborted) return;
    const { currentTime: at, paused } = this.#video;
    this.#video.onerror = async () => {
      // its pass ended while it was shown, or the server was started again
      if ((await passIsOver(url).catch(() => false)) && !signal.aborted) this.file(id).catch(() => {});
    };
    this.#show(url);
    if (at) this.#video.currentTime = at;
    if (at && !paused) this.#video.play().catch(() => {});
  }

  /**
   * What is made of `id` so far and all that follows, also over lost connections; true when its end was reached.
   * `seconds`: its final length.
   */
  async stream(id, seconds) {
    this.clear();
    const { signal } = this.#stop;
    try {
      return Source ? await this.#feed(bytesOf(id, signal), seconds, signal) : false;
    } catch {
      return false; // deleted, failed, or begun anew: the events say which
    }
  }

  async #feed(pieces, seconds, signal) {
    const head = [];
    let source = null;
    for await (const piece of pieces) {
      if (signal.aborted) return false;
      let next = piece;
      if (!source) {
        head.push(piece);
        next = joined(head);
        const codec = codecOf(next);
        if (!codec) continue;
        source = await this.#open(`video/mp4; codecs="${codec}"`, seconds);
        if (!source) return false;
      }
      await this.#append(source.sourceBuffers[0], next, signal);
    }
    if (source?.readyState !== "open") return false; // or the player could not read it
    source.endOfStream();
    return true;
  }

  /** A source that the player shows, with a buffer for what is of this type; null where the browser cannot play it. */
  async #open(type, seconds) {
    if (!Source.isTypeSupported(type)) return null;
    const source = new Source();
    this.#video.disableRemotePlayback = true; // Safari's condition for a ManagedMediaSource
    this.#show(URL.createObjectURL(source));
    await once(source, "sourceopen");
    source.addSourceBuffer(type);
    if (seconds > 0) source.duration = seconds;
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.#video.play().catch(() => {});
    return source;
  }

  async #append(buffer, bytes, signal) {
    for (;;) {
      try {
        buffer.appendBuffer(bytes);
        return await once(buffer, "updateend");
      } catch (error) {
        if (error.name !== "QuotaExceededError" || signal.aborted) throw error;
        const until = this.#video.currentTime - KEEP_S;
        if (until > 0) {
          buffer.remove(0, until);
          await once(buffer, "updateend");
        }
        await new Promise((done) => setTimeout(done, 1000));
      }
    }
  }
}
