/** The worker as seen from the page: it is started when the reader asks, and shared by all pieces. */

import { Told } from "./dom.js";

/** @type {string} the worker's source, put in by build.mjs */
// @ts-ignore
const SOURCE = WORKER;
/** @type {string} the kernel in base64, put in by build.mjs */
// @ts-ignore
const CODE = KERNEL;

const FOLDER = (document.currentScript instanceof HTMLScriptElement ? document.currentScript.src : "")
  .replace(/[^/]*$/, "");

/** @typedef {{resolve: (x: any) => void, reject: (x: any) => void, news: (x: any) => void}} Waiting */

class Client {
  constructor() {
    /** @type {Worker | null} */
    this.worker = null;
    /** @type {Map<number, Waiting>} */
    this.waiting = new Map();
    this.asked = 0;
    this.pieces = 0;
    /** @type {Promise<any> | null} */
    this.loading = null;
    /** @type {Set<(done: number, all: number) => void>} */
    this.watchers = new Set();
  }

  start() {
    if (this.worker) return;
    try {
      const url = URL.createObjectURL(new Blob([SOURCE], { type: "text/javascript" }));
      this.worker = new Worker(url);
    } catch {
      throw new Told("This browser starts no worker for this page, so the model cannot run here.");
    }
    this.worker.onmessage = ({ data }) => {
      const found = this.waiting.get(data.number);
      if (!found) return;
      if (data.news) return void found.news(data.news);
      this.waiting.delete(data.number);
      if (data.problem === undefined) found.resolve(data.found);
      else found.reject(data.refused ? new Told(data.problem, data.refused) : new Error(data.problem));
    };
    this.worker.onerror = () => {
      const lost = new Told("The model stopped: this device may have too little memory. Reload the page.");
      for (const one of this.waiting.values()) one.reject(lost);
      this.waiting.clear();
    };
  }

  /** @param {string} what @param {object} [ask] @param {(news: any) => void} [news] @returns {Promise<any>} */
  ask(what, ask = {}, news = () => {}) {
    return new Promise((resolve, reject) => {
      const number = ++this.asked;
      this.waiting.set(number, { resolve, reject, news });
      this.worker?.postMessage({ number, what, ask });
    });
  }

  /** Load the model, once; what is asked for again goes on where it stopped.
   * @param {(done: number, all: number) => void} watch @returns {Promise<any>} */
  load(watch) {
    this.watchers.add(watch);
    this.loading ??= this.loaded().catch((problem) => {
      this.loading = null;
      throw problem;
    });
    return this.loading;
  }

  async loaded() {
    this.start();
    for (let all = this.pieces + 1; this.pieces < all; this.pieces++) {
      all = await this.piece(this.pieces);
      for (const watch of this.watchers) watch(this.pieces + 1, all);
    }
    const plain = new URLSearchParams(location.search).has("plain"); // for comparison
    return this.ask("start", { kernel: CODE, plain }).catch((problem) => {
      this.pieces = 0; // the worker has let them go
      throw problem instanceof Told ? problem : new Told(
        `The model could not be put together here; this device may have too little memory. (${problem.message})`);
    });
  }

  /** One script of the model's bytes, handed on. @param {number} wanted @returns {Promise<number>} */
  piece(wanted) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const broken = () => reject(new Told(
        `Piece ${wanted + 1} of the model could not be read. The book's folder may not be whole; try again.`));
      /** @type {any} */ (window).livingPiece = (/** @type {number} */ number, /** @type {number} */ all, /** @type {string} */ text) => {
        if (number !== wanted) return broken();
        this.ask("piece", { number, text }).then(() => resolve(all), reject);
      };
      script.src = `${FOLDER}piece-${String(wanted).padStart(2, "0")}.js`;
      script.onerror = broken;
      script.onload = () => script.remove();
      document.head.append(script);
    });
  }
}

export const client = new Client();
