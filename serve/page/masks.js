// From the service's 16-bit scores to pixels, areas and mean scores at any threshold, without asking again.

const TOP = 65535; // the score 1
const FILL = 0x78; // opacity of a mask, of 255
const BAND = 12; // canvas pixels along x of the stripes in which overlapping masks take turns

// The colours of `rlfseg.draw`: told apart by most people who see few colours, and unlike skin, grass or sky.
const PALETTE = [
  [230, 25, 120], [0, 158, 240], [255, 176, 0], [20, 190, 120], [150, 80, 240], [255, 95, 30], [0, 205, 205],
  [190, 215, 0], [35, 60, 170], [150, 75, 20], [255, 175, 205], [0, 95, 60], [125, 0, 40], [175, 165, 255],
  [105, 105, 0], [85, 85, 95],
];

/** Colour of the i-th phrase and the one that is legible on it, for CSS and canvas. */
export function colours(i) {
  const [r, g, b] = PALETTE[i % PALETTE.length];
  const light = 0.299 * r + 0.587 * g + 0.114 * b > 130;
  return { back: `rgb(${r} ${g} ${b})`, front: light ? "#16161a" : "#fff" };
}

/**
 * Scores of a grey PNG of 16 bits. A canvas would give its upper 8 bits alone, so it is decoded here.
 *
 * @param {string} base64 The PNG.
 * @returns {Promise<{width: number, height: number, values: Uint16Array}>} 0 to 65535, row by row.
 */
export async function readScores(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  if (bytes[24] !== 16 || bytes[25] !== 0 || bytes[28] !== 0) {
    throw new Error("The service sent scores that are not a plain grey PNG of 16 bits.");
  }
  const packed = [];
  for (let at = 8; at < bytes.length; at += view.getUint32(at) + 12) {
    if (view.getUint32(at + 4) === 0x49444154) packed.push(bytes.subarray(at + 8, at + 8 + view.getUint32(at))); // IDAT
  }
  const stream = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const lines = new Uint8Array(await new Response(stream).arrayBuffer());
  return { width, height, values: unfilter(lines, width, height) };
}

/** Undoes PNG's filters (PNG specification, section 9): a byte is told from those to the left, above and above left. */
function unfilter(lines, width, height) {
  const [stride, values] = [2 * width, new Uint16Array(width * height)];
  let above = new Uint8Array(stride);
  for (let y = 0; y < height; y++) {
    const filter = lines[y * (stride + 1)];
    const line = lines.subarray(y * (stride + 1) + 1, (y + 1) * (stride + 1));
    for (let i = 0; i < stride; i++) {
      const a = i > 1 ? line[i - 2] : 0;
      const b = above[i];
      if (filter === 1) line[i] += a;
      else if (filter === 2) line[i] += b;
      else if (filter === 3) line[i] += (a + b) >> 1;
      else if (filter === 4) line[i] += paeth(a, b, i > 1 ? above[i - 2] : 0);
    }
    for (let x = 0; x < width; x++) values[y * width + x] = 256 * line[2 * x] + line[2 * x + 1];
    above = line;
  }
  return values;
}

function paeth(a, b, c) {
  const da = Math.abs(b - c);
  const db = Math.abs(a - c);
  const dc = Math.abs(a + b - 2 * c);
  return da <= db && da <= dc ? a : db <= dc ? b : c;
}

/**
 * A mask's figures at a threshold: a pixel is mask where its score is above it.
 *
 * @returns {{area: number, score: number, box: ?number[], spot: ?{x: number, y: number}}} Pixels; mean score inside, 0
 *   where empty; [left, top, right, bottom) and the middle of the mask's thickest part, as a fraction of the picture, both
 *   null where empty.
 */
export function measure({ width, height, values }, threshold) {
  const bar = threshold * TOP;
  let [area, sum, sumX, sumY] = [0, 0, 0, 0];
  let [left, top, right, bottom] = [width, height, 0, 0];
  for (let y = 0, p = 0; y < height; y++) {
    for (let x = 0; x < width; x++, p++) {
      if (values[p] > bar) {
        area += 1;
        sum += values[p];
        sumX += x;
        sumY += y;
        if (x < left) left = x;
        if (x >= right) right = x + 1;
        if (y < top) top = y;
        bottom = y + 1;
      }
    }
  }
  if (!area) return { area, score: 0, box: null, spot: null };
  const spot = thickest(values, bar, width, height, sumX / area, sumY / area);
  return { area, score: sum / area / TOP, box: [left, top, right, bottom], spot };
}

/** The pixel farthest from what is outside, counting a king's steps, and of several the one nearest to (x0, y0). */
function thickest(values, bar, width, height, x0, y0) {
  const wide = width + 2; // with a border that is outside
  const far = new Uint16Array(wide * (height + 2));
  for (let y = 0, p = 0; y < height; y++) {
    for (let x = 0, at = (y + 1) * wide + 1; x < width; x++, at++, p++) {
      if (values[p] <= bar) continue;
      far[at] = 1 + Math.min(far[at - 1], far[at - wide - 1], far[at - wide], far[at - wide + 1]);
    }
  }
  let [depth, off, bestX, bestY] = [0, 0, 0, 0];
  for (let y = height - 1; y >= 0; y--) {
    for (let x = width - 1, at = (y + 1) * wide + width; x >= 0; x--, at--) {
      if (!far[at]) continue;
      far[at] = Math.min(far[at], 1 + Math.min(far[at + 1], far[at + wide + 1], far[at + wide], far[at + wide - 1]));
      if (far[at] < depth) continue;
      const away = (x - x0) ** 2 + (y - y0) ** 2;
      if (far[at] > depth || away < off) [depth, off, bestX, bestY] = [far[at], away, x, y];
    }
  }
  return { x: (bestX + 0.5) / width, y: (bestY + 0.5) / height };
}

/**
 * Masks in their colours, outlined, on nothing. Where masks overlap, they take turns in stripes.
 *
 * @param {{width: number, height: number, values: Uint16Array, colour: number}[]} layers All of one size, not none.
 * @param {number} threshold In [0, 1].
 * @param {number} zoom Canvas pixels a pixel of the picture, a whole number.
 * @returns {ImageData} The picture's size times `zoom`.
 */
export function paintMasks(layers, threshold, zoom) {
  const bar = threshold * TOP;
  const [wide, high] = [layers[0].width * zoom, layers[0].height * zoom];
  const image = new ImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer); // ABGR: every machine with a browser is little-endian
  const depth = new Uint8Array(wide * high); // masks on a pixel
  const turn = new Uint8Array(wide * high); // those of them that have been painted
  const line = Math.max(1, Math.round(Math.max(wide, high) / 400)); // width of the outline
  // Of places on the canvas, those a line further out too: the picture's column, the first pixel of the picture's row
  const column = (x) => Math.floor(Math.min(Math.max(x, 0), wide - 1) / zoom);
  const row = (y) => Math.floor(Math.min(Math.max(y, 0), high - 1) / zoom) * layers[0].width;
  const [left, here, right] = [-line, 0, line].map((step) => Uint32Array.from({ length: wide }, (_, x) => column(x + step)));
  for (const { values } of layers) {
    for (let y = 0, at = 0; y < high; y++) {
      const middle = row(y);
      for (let x = 0; x < wide; x++, at++) if (values[middle + here[x]] > bar) depth[at] += 1;
    }
  }
  for (const { values, colour } of layers) {
    const [r, g, b] = PALETTE[colour % PALETTE.length];
    const [solid, tint] = [255, FILL].map((alpha) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0);
    for (let y = 0, at = 0; y < high; y++) {
      const [above, middle, below] = [row(y - line), row(y), row(y + line)];
      for (let x = 0; x < wide; x++, at++) {
        if (values[middle + here[x]] <= bar) continue;
        const isInner =
          values[middle + left[x]] > bar &&
          values[middle + right[x]] > bar &&
          values[above + here[x]] > bar &&
          values[below + here[x]] > bar;
        if (!isInner) pixels[at] = solid;
        else if (turn[at] === ((x / BAND) | 0) % depth[at]) pixels[at] = tint;
        turn[at] += 1;
      }
    }
  }
  return image;
}
