/** Elements in one line, and two small drawings. */

/** What went wrong, in a sentence for the reader; `about` names the field that it is about. */
export class Told extends Error {
  /** @param {string} message @param {string} [about] */
  constructor(message, about = "") {
    super(message);
    this.about = about;
  }
}

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "path", "circle", "text", "line", "g"]);

/** An element. `on…` are listeners; true is an attribute without a value, false and null are none.
 * @param {string} tag @param {Record<string, any>} [attributes]
 * @param {...(Node | string | number | null)} children @returns {any} */
export function h(tag, attributes = {}, ...children) {
  const made = DRAWN.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((one) => one !== null).map((one) => (typeof one === "number" ? String(one) : one)));
  return made;
}

/** A number as one reads it. @param {number} x */
export function number(x, digits = 3) {
  if (!Number.isFinite(x)) return "–";
  if (x !== 0 && (Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3)) {
    const [head, power] = x.toExponential(1).split("e");
    const raised = [...String(Number(power))].map((one) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(one)]).join("");
    return `${head}·10${raised}`;
  }
  if (Math.abs(x) >= 1000) return Math.round(x).toLocaleString("en");
  return x.toPrecision(digits).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

/** A probability. @param {number} p */
export const chance = (p) => (p < 0.001 ? "< .001" : p > 0.9995 ? "1.000" : p.toFixed(3).replace(/^0/, ""));

/** A line through points of a box of 0..1 both ways; `mark` is a point on it.
 * @param {string} label */
export function chart(label) {
  const path = h("path", { class: "living-line", fill: "none" }), mark = h("circle", { class: "living-mark", r: 5, cx: -9, cy: -9 });
  const box = h("svg", { viewBox: "0 0 300 120", class: "living-chart", role: "img", "aria-label": label },
    h("line", { x1: 4, y1: 116, x2: 296, y2: 116, class: "living-axis" }),
    h("line", { x1: 4, y1: 4, x2: 4, y2: 116, class: "living-axis" }), path, mark);
  const at = (/** @type {number[]} */ [x, y]) => `${(4 + 292 * x).toFixed(1)} ${(116 - 112 * y).toFixed(1)}`;
  return {
    box,
    /** @param {number[][]} points @param {number[] | null} [point] @param {string} [told] */
    draw(points, point = null, told = label) {
      path.setAttribute("d", points.length ? "M" + points.map(at).join("L") : "");
      const [cx, cy] = point ? at(point).split(" ") : ["-9", "-9"];
      mark.setAttribute("cx", cx);
      mark.setAttribute("cy", cy);
      box.setAttribute("aria-label", told);
    },
  };
}

/** A text field with its label, a hint, and room for what is wrong with it.
 * @param {string} label @param {string} value @param {string} hint @param {object} [more] */
export function field(label, value, hint, more = {}) {
  const id = `living-${label.toLowerCase().replace(/\W+/g, "-")}`;
  const wrong = h("span", { class: "living-wrong", id: `${id}-wrong`, role: "alert" });
  const input = h("input", { id, type: "text", value, autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-hint ${id}-wrong`, ...more });
  const node = h("p", { class: "living-field" }, h("label", { for: id }, label), input,
    h("span", { class: "living-hint", id: `${id}-hint` }, hint), wrong);
  const complain = (/** @type {string} */ text) => {
    wrong.textContent = text;
    if (text) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  };
  return { node, input, complain };
}

/** @typedef {ReturnType<typeof field>} Field */

/** Do something; what the reader did wrong is told beside a field: `where`, or the one of `fields`
 * that the problem names, which the reader is then led to. Returns whether all went well.
 * @param {Field} where @param {() => Promise<void>} what @param {Record<string, Field>} [fields] */
export async function trying(where, what, fields) {
  try {
    for (const one of fields ? Object.values(fields) : [where]) one.complain("");
    await what();
    return true;
  } catch (problem) {
    const found = (problem instanceof Told && fields?.[problem.about]) || where;
    if (problem instanceof Told) found.complain(problem.message);
    else {
      console.error(problem); // a mistake of the page's own: it is not to pass in silence
      found.complain(`The page failed at this: ${problem instanceof Error ? problem.message : problem}`);
    }
    if (fields) found.input.focus();
    return false;
  }
}

/** Runs the last call only, a while after it. @param {() => void} run @param {number} wait */
export function later(run, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = window.setTimeout(run, wait);
  };
}
