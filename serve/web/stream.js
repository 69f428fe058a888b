// The bytes of a video while it is made, also where the connection does not last as long as that: a phone was locked, the
// network is another one, the server was started again.

import { ApiError, FIRST_PAUSE, LAST, call, isFinal, longer, pathOf, readWithin, request, wait } from "./api.js";

/**
 * The bytes of the growing mp4 of `id`, each once, to its end. Each connection begins at the first byte; what was given
 * by those before is left out. Raises an error where no more will come, or what comes is another file: the mp4 of a
 * video that was finished meanwhile has its index first.
 */
export async function* bytesOf(id, signal) {
  const given = { length: 0, sum: 0 };
  for (let pause = FIRST_PAUSE; ; pause = longer(pause)) {
    const read = { length: 0, sum: 0 }; // by this connection
    try {
      const response = await request(pathOf(id, "/stream"), { signal, cache: "no-store" });
      for await (const piece of piecesOf(response.body, id)) {
        const known = piece.subarray(0, given.length - read.length);
        const fresh = piece.subarray(known.length);
        count(read, known);
        if (!fresh.length) continue;
        checkSame(read, given);
        count(given, fresh);
        Object.assign(read, given);
        pause = FIRST_PAUSE;
        yield fresh;
      }
      // or it was the end of the server alone
      if (LAST.includes((await call("GET", pathOf(id))).status)) return checkSame(read, given);
    } catch (error) {
      if (signal.aborted || isFinal(error)) throw error;
    }
    await wait(pause, signal);
  }
}

/** Raises ApiError where nothing comes though there is more: segments that are ready, or the end. */
async function* piecesOf(body, id) {
  const reader = body.getReader();
  try {
    for (let before = null, pending = reader.read(); ; ) {
      const piece = await readWithin(pending);
      if (!piece) {
        const { status, segments } = await call("GET", pathOf(id));
        const ready = segments.filter((segment) => segment.status === "completed").length;
        if (LAST.includes(status) || ready > (before ?? ready)) throw new ApiError(0, { message: "Nothing comes." });
        before = ready;
        continue;
      }
      if (piece.done) return;
      yield piece.value;
      before = null;
      pending = reader.read();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function count(bytes, more) {
  bytes.length += more.length;
  bytes.sum = more.reduce((sum, byte) => (Math.imul(sum, 31) + byte) | 0, bytes.sum);
}

function checkSame(read, given) {
  if (read.sum !== given.sum) throw new ApiError(409, { message: "It is another file by now." });
}
