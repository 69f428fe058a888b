// The page: what its parts tell each other.

import { ask } from "./ask.js";
import { call, key, kindOf, onKeyNeeded, pathOf, setKey } from "./api.js";
import { remember, startCommands } from "./commands.js";
import { renderSettings, startComposer } from "./compose.js";
import { $, brief, say, show } from "./dom.js";
import { markOpen, refreshLibrary, startLibrary } from "./library.js";
import { closeStage, openStage, opened, openedObject, startStage } from "./stage.js";

/** Posts, remembers what was posted, and opens what comes of it. Raises ApiError. */
async function make(path, body, image) {
  const object = await call("POST", path, body);
  remember(object.id, { path, body, image });
  await openOne(object.id, object);
  refreshLibrary();
  return object;
}

async function openOne(id, object = null) {
  await openStage(id, object);
  if (location.hash !== `#${id}`) history.pushState(null, "", `#${id}`);
  markOpen();
  if ($("stage").getBoundingClientRect().top < 0 || innerWidth < 864) $("stage").scrollIntoView({ block: "start" });
  $("stage-title").focus({ preventScroll: true });
}

/** What the address names; an unknown id leaves the place empty and says so. */
async function openAddressed() {
  const id = location.hash.slice(1);
  if (!/^(video|draft)_\w+$/.test(id)) {
    if (opened()) closeStage();
    return markOpen();
  }
  if (id === opened()) return;
  try {
    await openOne(id);
  } catch (error) {
    closeStage();
    $("stage-empty").textContent = error.message;
  }
}

const remix = (object) =>
  ask({
    title: "Remix",
    text: "The same seed, length and settings, with another text.",
    ok: "Make video",
    fields: ["prompt"],
    prompt: object.prompt,
    send: ({ prompt }) => make(pathOf(object.id, "/remix"), { prompt }),
  });

const extend = (object) =>
  ask({
    title: "Extend",
    text: "The new video shows this one, and goes on from its end.",
    ok: "Make video",
    fields: ["prompt", "seconds"],
    prompt: object.segments.at(-1).prompt,
    send: ({ prompt, seconds }) =>
      make("videos/extensions", { prompt, video: { id: object.id }, ...(seconds !== undefined && { seconds }) }),
  });

const remove = (object) =>
  ask({
    title: `Delete this ${kindOf(object.id) === "drafts" ? "draft" : "video"}?`,
    text: `“${brief(object.prompt)}” cannot be brought back.`,
    ok: "Delete",
    danger: true,
    send: async () => {
      await call("DELETE", pathOf(object.id));
      if (opened() === object.id) {
        closeStage();
        history.pushState(null, "", location.pathname + location.search);
      }
      await refreshLibrary();
    },
  });

const askForKey = (wrong) =>
  ask({
    title: wrong ? "That key is not accepted" : "This server asks for a key",
    text: "It is kept in this tab alone, and forgotten when the tab is closed.",
    ok: "Use it",
    fields: ["key"],
    send: async ({ key: given }) => {
      if (!given.trim()) throw new Error("Type a key, or cancel.");
      setKey(given.trim());
      show($("key-button"), true);
      return true;
    },
  }).then(Boolean);

async function renderDraft() {
  $("render").disabled = true;
  try {
    await make("videos", { draft: opened(), ...renderSettings() });
  } catch (error) {
    say($("stage-error"), error.message);
    $("render").disabled = false;
  }
}

async function describeServer() {
  try {
    const { data } = await call("GET", "models");
    $("server").textContent = `model ${data.map((model) => model.id).join(", ")}`;
  } catch (error) {
    $("server").textContent = error.message;
  }
}

async function start() {
  startComposer((kind, body, image) => make(kind, body, image));
  startStage((object, rerolled) => {
    if (rerolled) remember(object.id, rerolled, false);
    refreshLibrary();
  });
  startLibrary({ open: (id) => openOne(id).catch((error) => say($("cards-note"), error.message)), remix, extend, remove });
  startCommands(openedObject);
  onKeyNeeded(askForKey);
  show($("key-button"), Boolean(key()));
  $("key-button").onclick = () => {
    setKey("");
    location.reload();
  };
  $("render").onclick = renderDraft;
  $("remix").onclick = () => remix(openedObject());
  $("extend").onclick = () => extend(openedObject());
  $("delete").onclick = () => remove(openedObject());
  addEventListener("popstate", openAddressed);
  await describeServer(); // first, so that only one request asks for a key
  await refreshLibrary();
  await openAddressed();
}

start();
