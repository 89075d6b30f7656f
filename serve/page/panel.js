// One result: the picture under its masks, a legend, timings, downloads and the request as a `curl` line.

import { colours, measure, paintMasks, readScores } from "./masks.js";
import { curlLine } from "./service.js";

const SIDE = 720; // canvas pixels of a picture's longer side at least: small ones are enlarged by a whole number
const STAGES = { decode: "Decode", wait: "Wait", encode: "Encode", network: "Network", draw: "Masks" };

/** What a way of sampling is called. */
export function title({ steps, rescale }) {
  if (rescale !== "none") return `One step, ${rescale.toUpperCase()}`;
  return steps === 1 ? "One step" : `${steps} steps`;
}

/** A result on the page; `Panel.of` makes one, `update` shows it at a threshold. */
export class Panel {
  /**
   * @param {object} asked Picture, phrases and model.
   * @param {{steps: number, rescale: string}} settings How the masks were sampled.
   * @param {string} text The service's answer.
   * @param {number} trip Milliseconds from question to answer.
   * @returns {Promise<Panel>}
   */
  static async of(asked, settings, text, trip) {
    const answer = JSON.parse(text);
    const entries = answer.images[0].phrases;
    const scores = await Promise.all(entries.map((e) => (e.status === "ok" ? readScores(e.mask.data) : null)));
    return new Panel(asked, settings, { answer, entries, trip }, scores);
  }

  constructor(asked, settings, { answer, entries, trip }, scores) {
    Object.assign(this, { asked, settings, answer, image: answer.images[0] });
    this.element = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.element.querySelector(selector);
    this.layers = entries.map((entry, i) => ({ entry, ...scores[i], colour: i, ...this.#row(entry, i) }));
    this.zoom = Math.max(1, Math.ceil(SIDE / Math.max(this.image.width, this.image.height)));
    this.canvas = this.find("canvas");
    [this.canvas.width, this.canvas.height] = [this.image.width * this.zoom, this.image.height * this.zoom];
    this.find(".picture").style.setProperty("--ratio", this.canvas.width / this.canvas.height);
    this.overlay = new OffscreenCanvas(this.canvas.width, this.canvas.height);
    this.find("h2").textContent = title(settings);
    this.element.setAttribute("aria-label", title(settings));
    this.#showTimes(answer.total_ms, trip);
    this.find(".png").addEventListener("click", () => this.#savePng());
    this.find(".json").addEventListener("click", () => this.#saveJson());
    this.find(".copy").addEventListener("click", () => this.#copy());
    this.find(".original").addEventListener("click", () => saveAs(asked.picture.blob, asked.picture.name));
  }

  /** The model's own threshold. */
  get ownThreshold() {
    return this.layers.find(({ entry }) => entry.status === "ok")?.entry.threshold ?? 0.5;
  }

  /**
   * Paints masks and figures anew.
   *
   * @param {?number} threshold In [0, 1]; null: the model's own.
   */
  update(threshold) {
    this.threshold = threshold;
    const [limit, pixels] = [threshold ?? this.ownThreshold, this.image.width * this.image.height];
    for (const layer of this.layers.filter((l) => l.values)) {
      layer.figures = measure(layer, limit);
      layer.score.textContent = layer.figures.score.toFixed(2);
      layer.area.textContent = percent(layer.figures.area / pixels);
      layer.area.title = `${layer.figures.area} of ${pixels} pixels`;
    }
    this.#paint(limit);
    const said = this.#found().map((l) => `${l.colour + 1} ${l.entry.phrase}, ${l.area.textContent}`);
    const seen = said.length ? `masks: ${said.join("; ")}` : "no mask";
    this.canvas.setAttribute("aria-label", `${this.asked.picture.name} with ${seen}`);
    this.find("code").textContent = curlLine(this.asked, this.settings, threshold);
  }

  /** Layers that are switched on and not empty. */
  #found() {
    return this.layers.filter((l) => l.values && l.box.checked && l.figures.area);
  }

  #paint(limit) {
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.asked.picture.bitmap, 0, 0, this.canvas.width, this.canvas.height);
    const shown = this.#found();
    if (shown.length) {
      this.overlay.getContext("2d").putImageData(paintMasks(shown, limit, this.zoom), 0, 0);
      context.drawImage(this.overlay, 0, 0);
    }
    this.find(".numbers").replaceChildren(
      ...shown.map((layer) => {
        const number = swatch(layer.colour);
        number.style.left = `${100 * layer.figures.spot.x}%`;
        number.style.top = `${100 * layer.figures.spot.y}%`;
        return number;
      }),
    );
  }

  /** A line of the legend; returns the parts that change. */
  #row(entry, i) {
    const isFound = entry.status === "ok";
    const box = make("input", { type: "checkbox", checked: isFound, disabled: !isFound });
    box.addEventListener("change", () => this.update(this.threshold));
    const [head, label] = [make("th", { scope: "row" }), make("label")];
    label.append(box, swatch(i), make("span", { textContent: entry.phrase }));
    head.append(label, ...notes(entry).map((textContent) => make("small", { textContent })));
    const [score, area] = [make("td"), make("td")];
    this.find("tbody").insertRow().append(head, score, area);
    return { box, score, area };
  }

  #showTimes(total, trip) {
    const { timing_ms: times, cached } = this.image;
    const stages = Object.entries(STAGES).map(([stage, name]) => [name, milliseconds(times[stage])]);
    if (cached) stages[2][1] = "known";
    for (const [name, value] of [...stages, ["Total", milliseconds(total)], ["Round trip", milliseconds(trip)]]) {
      const pair = make("div");
      pair.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
      this.find("dl").append(pair);
    }
  }

  /** The picture as it is seen, above its legend. */
  async #savePng() {
    const { width, height } = this.canvas;
    const unit = Math.max(16, Math.round(width / 40)); // height of a letter
    const sheet = new OffscreenCanvas(width, height + unit * (2 * this.layers.length + 1));
    const context = sheet.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.drawImage(this.canvas, 0, 0);
    context.textBaseline = "middle";
    for (const { colour, figures } of this.#found()) {
      drawSwatch(context, unit, colour, figures.spot.x * width, figures.spot.y * height);
    }
    for (const { entry, colour, figures, score, area } of this.layers) {
      const y = height + unit * (2 * colour + 1.5);
      const said = figures ? `score ${score.textContent}, area ${area.textContent}` : entry.error.message;
      const phrase = entry.phrase.length > 50 ? `${entry.phrase.slice(0, 49)}…` : entry.phrase;
      drawSwatch(context, unit, colour, 1.5 * unit, y);
      context.fillStyle = "#16161a";
      context.font = `${unit}px system-ui, sans-serif`;
      context.textAlign = "left";
      context.fillText(`${phrase}: ${said}`, 3 * unit, y, width - 4 * unit);
    }
    this.#save(await sheet.convertToBlob(), "png");
  }

  /** The service's answer, with the figures that it would give at the threshold that is set. */
  #saveJson() {
    const now = ({ entry, figures }) => {
      if (this.threshold === null || !figures) return entry;
      const { score, area, box } = figures;
      return { ...entry, score, area, box, threshold: this.threshold };
    };
    const answer = { ...this.answer, images: [{ ...this.image, phrases: this.layers.map(now) }] };
    this.#save(new Blob([JSON.stringify(answer)], { type: "application/json" }), "json");
  }

  #save(blob, suffix) {
    const stem = this.asked.picture.name.replace(/\.[^.]*$/, "") || "picture";
    saveAs(blob, `${stem}.${title(this.settings).toLowerCase().replaceAll(/\W+/g, "-")}.${suffix}`);
  }

  async #copy() {
    const [button, code] = [this.find(".copy"), this.find("code")];
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected: press Ctrl+C"; // browsers lend the clipboard to secure pages alone
    }
  }
}

/** Hands the user a file. */
function saveAs(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // Safari reads it after the click
}

function notes(entry) {
  if (entry.status !== "ok") return [`${entry.error.message} (${entry.error.kind})`];
  const said = [];
  if (entry.truncated) said.push("Only its beginning was read: it is too long for the text encoder.");
  if (entry.gamma) said.push(`γ = ${entry.gamma.toFixed(3)}${entry.clipped ? ", at its limit" : ""}`);
  return said;
}

function swatch(i) {
  const { back, front } = colours(i);
  const mark = make("span", { className: "swatch", textContent: i + 1 });
  Object.assign(mark.style, { background: back, color: front });
  return mark;
}

function drawSwatch(context, unit, i, x, y) {
  const { back, front } = colours(i);
  context.fillStyle = back;
  context.beginPath();
  context.roundRect(x - 0.8 * unit, y - 0.8 * unit, 1.6 * unit, 1.6 * unit, 0.4 * unit);
  context.fill();
  context.fillStyle = front;
  context.font = `600 ${unit}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.fillText(i + 1, x, y);
}

const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const milliseconds = (t) => `${t < 10 ? t.toFixed(1) : Math.round(t)} ms`;
const percent = (part) => `${(100 * part).toFixed(1)} %`;
