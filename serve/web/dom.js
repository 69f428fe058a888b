// Elements are made here, and text is only ever set as text: nothing that a person or the server wrote is read as HTML.

export const $ = (id) => document.getElementById(id);

/** A new element: properties (`data-…` and `aria-…` as attributes), then children (elements or text). */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Said to people who hear the page; not for what changes many times a second. */
export function announce(text) {
  $("live").textContent = text;
}

export function show(element, visible) {
  element.hidden = !visible;
}

/** Text of an error line, which is hidden while there is none. */
export function say(element, text) {
  element.textContent = text;
  show(element, Boolean(text));
}

export const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};

export const brief = (text, length = 80) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

/** What a number field holds: undefined where it is empty, NaN where it is no number. */
export function numberOf(input) {
  if (input.validity.badInput) return NaN;
  return input.value.trim() === "" ? undefined : Number(input.value);
}

/** Marks `input` as wrong, with `message` below it; an empty message takes the mark away. */
export function mark(input, message) {
  const id = `${input.id}-error`;
  let line = $(id);
  if (!message) {
    line?.remove();
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
    return;
  }
  if (!line) {
    line = h("p", { className: "error", id });
    (input.closest(".joined") ?? input.closest(".tools") ?? input).after(line);
  }
  line.textContent = message;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", id);
  const folded = input.closest("details");
  if (folded) folded.open = true;
}

export function unmark(form) {
  for (const input of form.querySelectorAll("[aria-invalid]")) mark(input, "");
}

/**
 * Shows an API's error at the field that it names, else in `line`. `find(param)` may know fields that have no
 * data-param of their own.
 */
export function showError(form, error, line, find = () => null) {
  const param = error.param ?? "";
  const named = [...form.querySelectorAll("[data-param]")];
  const input =
    (param && (find(param) ?? named.find((field) => param === field.dataset.param))) ||
    named.find((field) => param.startsWith(`${field.dataset.param}.`));
  if (!input || input.closest("[hidden]")) return say(line, error.message);
  mark(input, error.message);
  input.focus();
  announce(error.message);
}
