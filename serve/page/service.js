// The service's HTTP interface, the key that it may ask for, and the same request as a line for a shell.

const KEY = "rlfseg-key"; // in sessionStorage: the tab's, gone with it
const dialog = document.getElementById("key-dialog");

/**
 * A request to the service; asks the user for a key when there is none or it is refused, and goes on with it.
 *
 * @param {string} path Relative to the page, which may lie below a prefix.
 * @param {RequestInit} options Of `fetch`.
 * @returns {Promise<string>} The answer's text.
 * @throws {Error} With one line for the user.
 */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, { ...options, headers: key ? { "X-API-Key": key } : {} }).catch((error) => {
      throw options.signal?.aborted ? error : new Error("The service can't be reached.");
    });
    if (response.ok) return response.text();
    if (response.status !== 401) throw await problem(response);
    sessionStorage.setItem(KEY, await askForKey(key !== null));
  }
}

async function problem(response) {
  const text = await response.text();
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` Try again in ${wait} s.` : "";
  try {
    const { error, request_id: id } = JSON.parse(text);
    return new Error(`${error.message}.${again} (${response.status} ${error.kind}, request ${id})`);
  } catch {
    return new Error(`The service answered ${response.status} ${response.statusText}.${again}`);
  }
}

/** The key that the user types, or an error if they'd rather not. */
function askForKey(isRefused) {
  const [field, note] = [dialog.querySelector("input"), dialog.querySelector("[role=alert]")];
  field.value = "";
  note.textContent = isRefused ? "The service refused that key." : "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    const done = () => {
      const key = field.value;
      field.value = "";
      if (dialog.returnValue === "use") resolve(key);
      else reject(new Error("This service needs an API key."));
    };
    dialog.addEventListener("close", done, { once: true });
  });
}

/**
 * The form that asks for scores.
 *
 * @param {{picture: {name: string, blob: Blob}, phrases: string[], model: string}} asked What to look for, and where.
 * @param {{steps: number, rescale: string}} settings How.
 * @returns {[string, string | Blob][]} Fields in order; defaults are left out.
 */
function fields({ picture, phrases, model }, { steps, rescale }) {
  const chosen = [["images", picture.blob], ...phrases.map((p) => ["phrases", p])];
  if (model) chosen.push(["model", model]);
  if (steps !== 1) chosen.push(["steps", String(steps)]);
  if (rescale !== "none") chosen.push(["rescale", rescale]);
  return [...chosen, ["output", "score"]];
}

/** Asks for scores; returns the answer's text. See `fields` and `call`. */
export function segment(asked, settings, signal) {
  const body = new FormData();
  for (const [name, value] of fields(asked, settings)) {
    if (value instanceof Blob) body.append(name, value, asked.picture.name);
    else body.append(name, value);
  }
  return call("v1/segment", { method: "POST", body, signal });
}

/**
 * The request as a `curl` command for a POSIX shell. It never holds the key: that comes from the environment.
 *
 * @param {?number} threshold As set by the user; null: the model's own.
 */
export function curlLine(asked, settings, threshold) {
  const parts = [`curl ${quote(new URL("v1/segment", document.baseURI).href)}`];
  if (sessionStorage.getItem(KEY)) parts.push(`-H "X-API-Key: $RLFSEG_API_KEY"`);
  for (const [name, value] of fields(asked, settings)) {
    // -F reads meaning into `@`, `<` and `;` of a value, --form-string into nothing
    if (value instanceof Blob) parts.push(`-F ${quote(`${name}=@${formName(asked.picture.name)}`)}`);
    else parts.push(`--form-string ${quote(`${name}=${value}`)}`);
  }
  if (threshold !== null) parts.push(`--form-string threshold=${threshold}`);
  return parts.join(" \\\n  ");
}

const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** A file's name as -F takes it: `,` and `;` end a name unless it stands in double quotes. */
const formName = (name) => (/^[\w.][\w. -]*$/.test(name) ? name : `"${name.replaceAll(/["\\]/g, "\\$&")}"`);
