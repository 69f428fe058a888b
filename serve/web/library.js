// Earlier videos and drafts, newest first.

import { call, mediaUrl, passIsOver, pathOf } from "./api.js";
import { $, brief, h, say, show } from "./dom.js";
import { offer, opened } from "./stage.js";

const PAGE = 12;
const REFRESH_MS = 4000;
const AGES = [["day", 86400], ["hour", 3600], ["minute", 60]];

let kind = "videos";
let items = [];
let cards = new Map(); // id → {element, parts}
let actions = {};

/** `actions`: open(id), remove(object), remix(object), extend(object). */
export function startLibrary(given) {
  actions = given;
  for (const tab of document.querySelectorAll("[data-list]")) {
    tab.onclick = () => {
      kind = tab.dataset.list;
      for (const other of document.querySelectorAll("[data-list]")) other.setAttribute("aria-pressed", String(other === tab));
      items = [];
      return refreshLibrary();
    };
  }
  $("more").onclick = async () => load(items.at(-1)?.id);
  setInterval(() => {
    if (!document.hidden && items.some((item) => ["queued", "in_progress"].includes(item.status))) refreshLibrary();
  }, REFRESH_MS);
}

export const refreshLibrary = () => load();

async function load(after = null) {
  const asked = kind;
  const limit = after ? PAGE : Math.min(100, Math.max(PAGE, items.length));
  try {
    const path = `${asked}?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`;
    const page = await call("GET", path);
    if (asked !== kind) return;
    items = after ? [...items, ...page.data] : page.data;
    show($("more"), page.has_more);
    say($("cards-note"), items.length ? "" : `No ${asked} yet.`);
  } catch (error) {
    if (asked !== kind) return;
    show($("more"), false);
    say($("cards-note"), error.message);
  }
  draw();
}

export function markOpen() {
  for (const [id, card] of cards) {
    card.element.classList.toggle("current", id === opened());
    card.open.toggleAttribute("aria-current", id === opened());
  }
}

function draw() {
  const list = $("cards");
  const before = cards;
  cards = new Map(items.map((item) => [item.id, before.get(item.id) ?? newCard(item)]));
  for (const [id, card] of before) {
    if (cards.has(id)) continue;
    card.element.remove();
  }
  items.forEach((item, index) => {
    const card = cards.get(item.id);
    // only what has moved is moved, for that takes the focus away
    if (list.children[index] !== card.element) list.insertBefore(card.element, list.children[index] ?? null);
    update(card, item);
  });
  markOpen();
}

function newCard(item) {
  const thumb = h("span", { className: "thumb" }, h("span"));
  const title = h("b");
  const state = h("small");
  const open = h("button", { type: "button", className: "open", onclick: () => actions.open(item.id) });
  open.append(thumb, h("span", { className: "about" }, title, state));
  const tools = h("div", { className: "tools" });
  return { element: h("li", { className: "card" }, open, tools), open, thumb, title, state, tools, status: null };
}

function update(card, item) {
  const text = brief(item.prompt.replaceAll("\n", " / "), 120);
  card.title.textContent = text;
  card.state.textContent = `${stateOf(item)} · ${+Number(item.seconds).toFixed(2)} s · ${age(item.created_at)}`;
  card.state.classList.toggle("failed", item.status === "failed");
  const ready = item.status === "completed";
  card.thumb.firstChild.textContent = ready ? "" : stateOf(item);
  if (card.status === item.status) return;
  card.status = item.status;
  const named = (tool, words) => {
    tool.setAttribute("aria-label", `${words}: ${text}`);
    tool.classList.add("plain");
    return tool;
  };
  const button = (words, action) => named(h("button", { type: "button", textContent: words, onclick: action }), words);
  const tools = [];
  if (ready) {
    const link = h("a", { textContent: "Download", className: "button" });
    offer(link, item.id);
    tools.push(named(link, "Download"));
    if (kind === "videos") tools.push(button("Extend", () => actions.extend(item)));
  }
  if (kind === "videos") tools.push(button("Remix", () => actions.remix(item)));
  tools.push(button("Delete", () => actions.remove(item)));
  card.tools.replaceChildren(...tools);
  if (ready) picture(card, item);
}

/** A picture of the video; a server that draws none leaves the place empty. */
async function picture(card, item) {
  const path = pathOf(item.id, "/content?variant=thumbnail");
  card.image?.remove();
  const image = (card.image = h("img", { alt: "", loading: "lazy" }));
  image.onerror = async () => {
    if (await passIsOver(image.src).catch(() => false)) image.src = await mediaUrl(path);
    else image.remove();
  };
  try {
    image.src = await mediaUrl(path);
    card.thumb.append(image);
  } catch {
    // no pass: the place stays empty
  }
}

const stateOf = ({ status, progress }) => (status === "in_progress" ? `${progress} %` : status);

function age(then) {
  const seconds = Date.now() / 1000 - then;
  for (const [unit, size] of AGES) {
    const count = Math.floor(seconds / size);
    if (count > 0) return `${count} ${unit}${count > 1 ? "s" : ""} ago`;
  }
  return "just now";
}
