// The one dialog that asks: for a prompt, for a key, or whether something shall really be done. Esc closes it.

import { $, numberOf, say, show, showError, unmark } from "./dom.js";

const dialog = $("ask");

/**
 * Opens the dialog. `send(answer)` does what was asked for, with {prompt, seconds, key}; what it raises is shown, and
 * the dialog stays. Resolves to what `send` returned, or null where nothing was done.
 */
export function ask({ title, text = "", ok, danger = false, fields = [], prompt = "", send }) {
  $("ask-title").textContent = title;
  say($("ask-text"), text);
  for (const name of ["prompt", "seconds", "key"]) show($(`ask-${name}-field`), fields.includes(name));
  $("ask-prompt").value = prompt;
  $("ask-seconds").value = "";
  $("ask-key").value = "";
  $("ask-ok").textContent = ok;
  $("ask-ok").className = danger ? "danger" : "primary";
  say($("ask-error"), "");
  unmark(dialog);
  const form = dialog.querySelector("form");
  return new Promise((resolve) => {
    let result = null;
    form.onsubmit = async (event) => {
      event.preventDefault();
      say($("ask-error"), "");
      unmark(dialog);
      $("ask-ok").disabled = true;
      try {
        const answer = { prompt: $("ask-prompt").value, seconds: numberOf($("ask-seconds")), key: $("ask-key").value };
        result = await send(answer);
        dialog.close();
      } catch (error) {
        showError(form, error, $("ask-error"));
      } finally {
        $("ask-ok").disabled = false;
      }
    };
    dialog.onclose = () => resolve(result);
    $("ask-cancel").onclick = () => dialog.close();
    dialog.showModal();
    (fields.length ? $(`ask-${fields[0]}`) : $("ask-cancel")).focus();
  });
}
