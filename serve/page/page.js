// The page: a picture and phrases go in, one result or two side by side come out.

import { Panel } from "./panel.js";
import { call, segment } from "./service.js";

const MOST_PIXELS = 1_000_000; // of a picture that is sent: scores of more take long on their way and to paint
const ONE_STEP = { steps: 1, rescale: "none" };
const $ = (id) => document.getElementById(id);

let models = []; // as `GET /v1/models` lists them
let listing = null; // promise of that list, null again once it has failed
let picture = null; // promise of {name, blob, bitmap}: chosen
let asked = null; // {picture, phrases, model}: what the panels answer
let panels = [];
let threshold = null; // as set by the user; null: the model's own
let running = null; // AbortController of the question under way
let frame = 0; // the repainting that waits for the screen

// --- the picture ---------------------------------------------------------------------------------------------------

/** Takes a file as the picture. */
async function choose(file) {
  say("");
  const mine = (picture = load(file));
  try {
    const { name, blob, bitmap } = await mine;
    if (mine !== picture) return; // another one was chosen meanwhile
    URL.revokeObjectURL($("preview").src);
    $("preview").src = URL.createObjectURL(blob);
    $("preview").hidden = false;
    const note = blob === file ? "" : ", made smaller for this page";
    $("chosen").textContent = `${name}, ${bitmap.width} × ${bitmap.height}${note}`;
  } catch {
    if (mine !== picture) return;
    picture = null;
    $("preview").hidden = true;
    $("chosen").textContent = "";
    fail(`This browser can't read ${file.name || "that"} as a picture.`);
  }
}

/** Decodes a file, and makes it smaller if it is very large. */
async function load(file) {
  const name = file.name || "picture.png";
  const bitmap = await createImageBitmap(file); // turned as EXIF says, as the service does
  const scale = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (scale >= 1) return { name, blob: file, bitmap };
  const small = new OffscreenCanvas(Math.floor(bitmap.width * scale) || 1, Math.floor(bitmap.height * scale) || 1);
  const context = small.getContext("2d");
  context.fillStyle = "#fff"; // on which the service lays what is transparent, too
  context.fillRect(0, 0, small.width, small.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, small.width, small.height);
  const blob = await small.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  return { name: `${name.replace(/\.[^.]*$/, "")}.small.jpg`, blob, bitmap: await createImageBitmap(blob) };
}

/** A drawn scene that lies in the page itself. */
function sceneFile({ src, dataset }) {
  const bytes = Uint8Array.from(atob(src.split(",")[1]), (c) => c.charCodeAt(0));
  return new File([bytes], `scene-${dataset.scene}.png`, { type: "image/png" });
}

// --- questions and answers -----------------------------------------------------------------------------------------

async function ask() {
  const phrases = $("phrases").value.split("\n").map((p) => p.trim()).filter(Boolean);
  if (!picture) return fail("Choose a picture first.", $("file"));
  if (!phrases.length) return fail("Say what to look for.", $("phrases"));
  const chosen = await picture.catch(() => null);
  if (!chosen) return; // `choose` has said why
  try {
    await listModels(); // at last, where there was no key yet, or no service
  } catch (error) {
    return fail(error.message);
  }
  asked = { picture: chosen, phrases, model: models.length > 1 ? $("model").value : "" };
  panels = [];
  await answer();
}

/** Asks for what is missing on the page: the first result, and the other one if two are to be compared. */
async function answer() {
  running?.abort();
  const mine = (running = new AbortController());
  say("");
  $("results").ariaBusy = "true";
  $("go").textContent = "Segmenting…";
  try {
    if (!panels.length) {
      show([await result(ONE_STEP, mine.signal)]);
      if ($("shown").getBoundingClientRect().top > innerHeight / 2) $("shown").scrollIntoView(); // on a phone
    }
    const other = compared();
    show(other ? [panels[0], await result(other, mine.signal)] : [panels[0]]);
    say(`${asked.phrases.length === 1 ? "1 phrase" : `${asked.phrases.length} phrases`} on ${asked.picture.name}`);
  } catch (error) {
    if (!mine.signal.aborted) {
      show(panels.slice(0, 1));
      fail(error.message);
    }
  } finally {
    if (mine === running) {
      $("results").ariaBusy = "false";
      $("go").textContent = "Segment";
    }
  }
}

async function result(settings, signal) {
  const [question, start] = [asked, performance.now()];
  const text = await segment(question, settings, signal);
  const panel = await Panel.of(question, settings, text, performance.now() - start);
  signal.throwIfAborted();
  return panel;
}

/** The way of sampling to compare one step with; null: none. */
function compared() {
  const way = $("ask").elements.way.value;
  if (way === "steps") return { steps: $("steps").valueAsNumber || 5, rescale: "none" };
  return way === "none" ? null : { steps: 1, rescale: way };
}

function show(results) {
  panels = results;
  $("results").replaceChildren(...panels.map((p) => p.element));
  $("shown").hidden = !panels.length;
  $("empty").hidden = panels.length > 0;
  update();
}

function update() {
  if (!panels.length) return;
  const own = panels[0].ownThreshold;
  const now = threshold ?? own;
  $("threshold").value = now;
  $("threshold").ariaValueText = $("limit").textContent = now.toFixed(2);
  $("own").textContent = `Model’s own: ${own.toFixed(2)}`;
  $("own").hidden = threshold === null;
  for (const panel of panels) panel.update(threshold);
}

// --- words to the user ---------------------------------------------------------------------------------------------

function say(text) {
  $("status").textContent = text;
  $("error").textContent = "";
}

function fail(text, field) {
  say("");
  $("error").textContent = text;
  $("error").scrollIntoView({ block: "nearest" });
  field?.focus();
}

/** Asks for the models until it is told. */
function listModels() {
  listing ??= list().catch((error) => {
    listing = null;
    throw error;
  });
  return listing;
}

async function list() {
  const listed = JSON.parse(await call("v1/models"));
  models = listed.models;
  $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
  $("models").hidden = models.length < 2;
  $("served").textContent = models.map((m) => `${m.name} ${m.version}`).join(", ");
  $("steps").max = listed.limits.steps;
  offer();
}

/** Offers only what the chosen model is calibrated for. */
function offer() {
  const { name, rescale } = models.find((m) => m.name === $("model").value);
  const missing = ["aos", "hss"].filter((way) => !rescale.includes(way));
  for (const radio of $("ask").elements.way) radio.disabled = missing.includes(radio.value);
  if (missing.includes($("ask").elements.way.value)) $("ask").elements.way.value = "none";
  $("missing").textContent = missing.length ? `${name} is not calibrated for ${missing.join(" or ").toUpperCase().replace("OR", "or")}.` : "";
}

// --- what the user does --------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("phrases").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("file").addEventListener("change", () => $("file").files.length && choose($("file").files[0]));
$("model").addEventListener("change", offer);
$("scenes").addEventListener("click", async ({ target }) => {
  const scene = target.closest("button")?.querySelector("img");
  if (!scene) return;
  await choose(sceneFile(scene));
  $("phrases").value = scene.dataset.phrases.replaceAll(", ", "\n");
  ask();
});
$("steps").addEventListener("input", () => ($("ask").elements.way.value = "steps"));
$("ways").addEventListener("change", () => panels.length && answer());
$("threshold").addEventListener("input", () => {
  threshold = $("threshold").valueAsNumber;
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(update);
});
$("own").addEventListener("click", () => {
  threshold = null;
  update();
  $("threshold").focus();
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  else fail("Drop a file: this page opens no links.");
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) choose(event.clipboardData.files[0]);
});

listModels().catch((error) => fail(error.message));
