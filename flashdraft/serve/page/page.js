// The page: a talk, and what drafting did for it while it is written.
// Text of a model is only ever text: it becomes nodes by textContent, nothing here makes markup.

import { Refused, chunksOf, modelName } from "./stream.js";
import { Tally } from "./tally.js";

const KEY = "flashdraft-key"; // in sessionStorage: of this tab, gone with it
const BLOCK = 2000; // characters of an answer in one element, so that a long one is not laid out anew
const NEAR = 48; // pixels from the end at which the page still follows the text
const FEWEST_BARS = 8;
const MOST_BARS = 16;
const FAR_SEED = 2 ** 31;

const find = (id) => document.getElementById(id);
const turns = []; // of the talk: {prompt, text, settings, runs, view}
let model = null;
let running = null; // the AbortController of the answer that is being written
let isFollowing = true;
let locked = null; // the turn that waits for a key

// --- Nodes ---

function made(tag, className, text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

function button(words, act) {
  const node = made("button", "quiet", words);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

/** A rejected draft as a few visible characters: no line breaks, nothing that steers writing. */
function visible(text) {
  const plain = text.slice(0, 64).replaceAll("\n", "↵").replace(/\p{C}/gu, "").trim();
  if (plain === "") return "␣";
  const letters = [...plain];
  return letters.length > 20 ? `${letters.slice(0, 20).join("")}…` : plain;
}

/** The draft that the target refused, and how many fell with it. */
function refusal(rejected) {
  const node = made("span", "rejected");
  node.setAttribute("aria-hidden", "true"); // no part of the answer
  node.append(made("del", "", visible(rejected[0])));
  if (rejected.length > 1) node.append(made("span", "more", `+${rejected.length - 1}`));
  node.title = `rejected: ${rejected.slice(0, 16).map(visible).join(" ")}`;
  return node;
}

/** Text that grows by steps: a row of blocks, each of which ends where a line does. */
class Prose {
  #element;
  #block;
  #length = 0;

  constructor(element) {
    this.#element = element;
    this.#begin();
  }

  #begin() {
    this.#block = made("span", "");
    this.#element.append(this.#block);
    this.#length = 0;
  }

  /** Pieces of tokens; what the target refused stands at the token that it took instead. */
  add(pieces) {
    for (const { text, mark, rejected } of pieces) {
      this.#write(text, mark, rejected.length > 0 ? refusal(rejected) : "");
    }
  }

  #write(text, mark, before) {
    const end = this.#length > BLOCK ? text.indexOf("\n") : -1;
    if (end === -1) {
      this.#append(text, mark, before);
      return;
    }
    this.#append(text.slice(0, end), mark, before);
    this.#begin(); // the line break itself
    this.#append(text.slice(end + 1), mark, "");
  }

  #append(text, mark, before) {
    this.#length += text.length;
    const word = text.trimStart();
    const space = text.slice(0, text.length - word.length);
    const isMarked = mark !== null && word !== "";
    this.#block.append(space, before, isMarked ? made("span", `${mark} is-new`, word) : word);
  }
}

/** One answer in the document. */
class View {
  #body;
  #before = null; // the body of the run before, until this one has text
  #prose = {};

  constructor(prompt) {
    this.element = made("li", "turn");
    const asked = made("div", "asked");
    asked.dir = "auto";
    asked.append(made("span", "hidden", "You: "), prompt);
    this.#body = made("div", "body");
    this.runs = made("div", "runs");
    this.foot = made("div", "foot");
    this.element.append(asked, this.#body, this.runs, this.foot);
  }

  /** Make room for another run. */
  begin() {
    this.#before = this.#body;
    this.#body = made("div", "body");
    this.#prose = {};
    this.#before.replaceWith(this.#body);
    this.foot.replaceChildren();
  }

  /** Put the run before back: this one wrote nothing. */
  revert() {
    this.#body.replaceWith(this.#before);
    this.#body = this.#before;
  }

  say(pieces) {
    this.#prose.said ??= new Prose(this.#room("said"));
    this.#prose.said.add(pieces);
  }

  think(pieces) {
    this.#prose.thought ??= new Prose(this.#thoughts());
    this.#prose.thought.add(pieces);
  }

  #thoughts() {
    const details = made("details", "thinking");
    details.open = true;
    details.append(made("summary", "", "Thinking"));
    this.#body.append(details);
    const room = this.#room("thought");
    details.append(room);
    return room;
  }

  #room(className) {
    const room = made("div", className);
    room.dir = "auto";
    this.#body.append(room);
    return room;
  }

  /** Nothing is new any more: a mark that is shown again must not look as if it was. */
  calm() {
    for (const node of this.#body.querySelectorAll(".is-new")) node.classList.remove("is-new");
  }

  fail(words, retry) {
    const problem = made("p", "problem", words);
    problem.setAttribute("role", "alert");
    this.foot.replaceChildren(problem);
    if (retry) this.offer("Try again", retry);
  }

  offer(words, act) {
    const row = made("div", "again");
    row.append(button(words, act));
    this.foot.append(row);
  }
}

// --- Figures ---

const decimals = (number, digits) => (number === null ? "–" : number.toFixed(digits));
const rate = (speed) => decimals(speed, speed < 1000 ? 1 : 0);
const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);

function showFigures(tally) {
  find("speed").textContent = rate(tally.speed);
  find("tau").textContent = decimals(tally.tau, 2);
  find("acceptance").textContent = percent(tally.acceptance);
  drawBars(tally.byPosition.slice(0, MOST_BARS));
}

function showRange(count) {
  find("range").textContent = ` (1–${count})`;
}

/** Bars are made once and then only stretched. */
function drawBars(shares) {
  const chart = find("chart");
  const [, , width, height] = chart.getAttribute("viewBox").split(" ").map(Number);
  const count = Math.max(FEWEST_BARS, shares.length);
  if (chart.childElementCount !== 2 * count) makeBars(chart, count, width / count, height);

  const bars = chart.querySelectorAll(".bar");
  bars.forEach((bar, i) => {
    const tall = height * (shares[i] ?? 0);
    bar.setAttribute("y", height - tall);
    bar.setAttribute("height", tall);
  });
}

function makeBars(chart, count, step, height) {
  chart.replaceChildren();
  showRange(count);
  for (const className of ["track", "bar"]) {
    for (let i = 0; i < count; i++) {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      bar.setAttribute("class", className);
      bar.setAttribute("x", i * step);
      bar.setAttribute("width", step - 2);
      bar.setAttribute("height", className === "track" ? height : 0);
      chart.append(bar);
    }
  }
}

function nameBars(tally) {
  const shares = tally.byPosition.map((share, i) => `${i + 1}: ${percent(share)}`);
  const words = shares.length > 0 ? shares.join(", ") : "no drafts";
  find("chart").setAttribute("aria-label", `Accepted by position: ${words}`);
}

function say(words) {
  find("status").textContent = words;
}

// --- What a run was like ---

function lineOf(run) {
  const { tally } = run;
  const words = [`Drafting ${run.drafting}`];
  if (tally.speed !== null) words.push(`${rate(tally.speed)} tokens/s`);
  if (tally.tau !== null) words.push(`tau ${decimals(tally.tau, 2)}`);
  words.push(`${tally.numTokens} tokens`);
  if (tally.wait !== null) words.push(`first after ${decimals(tally.wait, 2)} s`);
  if (run.reason === "length") words.push("ended by the limit");
  if (run.reason === "stopped") words.push("stopped");
  return words.map((word) => word.replaceAll(" ", "\u00a0")).join(" · ");
}

function wholeRuns(turn) {
  return turn.runs.filter((run) => ["stop", "length"].includes(run.reason));
}

/** What drafting changed, if the turn was answered with it and without it; else null. */
function comparisonOf(turn) {
  const whole = wholeRuns(turn);
  const plain = whole.findLast((run) => run.drafting === "off");
  const drafted = whole.findLast((run) => run.drafting !== "off");
  if (!plain?.tally.speed || !drafted?.tally.speed) return null;

  const ratio = decimals(drafted.tally.speed / plain.tally.speed, 2);
  const fork = forkOf(plain.text, drafted.text);
  const same = fork === -1 ? "The text is the same." : `The texts part after ${fork} characters.`;
  return `With drafting ${ratio} times as fast as without. ${same}`;
}

/** Where two texts part; -1: nowhere. */
function forkOf(one, other) {
  if (one === other) return -1;
  let i = 0;
  while (one[i] === other[i]) i++;
  return i;
}

// --- Asking ---

function settingsNow() {
  const seed = find("seed").value;
  return {
    temperature: find("temperature").valueAsNumber,
    max_tokens: find("max-tokens").valueAsNumber,
    seed: seed === "" ? Math.floor(Math.random() * FAR_SEED) : Number(seed),
  };
}

function draftingNow() {
  return document.querySelector("[name=drafting]:checked").value;
}

function keyNow() {
  return sessionStorage.getItem(KEY) ?? "";
}

function requestFor(turn, drafting) {
  const messages = [];
  for (const earlier of turns) {
    if (earlier === turn) break;
    if (earlier.text === "") continue; // never answered
    messages.push({ role: "user", content: earlier.prompt });
    messages.push({ role: "assistant", content: earlier.text });
  }
  messages.push({ role: "user", content: turn.prompt });
  const stream = { stream: true, stream_options: { include_usage: true }, draft_pieces: true };
  return { model, messages, drafting, ...turn.settings, ...stream };
}

async function ask(prompt) {
  turns.at(-1)?.view.foot.querySelector(".again")?.remove();
  const view = new View(prompt);
  const turn = { prompt, text: "", settings: settingsNow(), runs: [], view };
  turns.push(turn);
  find("intro").hidden = true;
  find("talk").append(view.element);
  follow(true);
  await answer(turn, draftingNow());
}

/** One run: ask, show what comes, say how it ended. */
async function answer(turn, drafting) {
  if (running !== null) return;
  const controller = new AbortController();
  const tally = new Tally(performance.now());
  const run = { drafting, tally, text: "", reason: null };
  const page = new Painter(turn.view, tally);
  const hadFocus = turn.view.foot.contains(document.activeElement); // on a button that goes
  running = controller;
  setBusy(true);
  turn.view.begin();
  if (hadFocus) find("stop").focus();
  showFigures(tally);

  let error = null;
  try {
    model ??= await loadModel();
    for await (const chunk of chunksOf(requestFor(turn, drafting), keyNow(), controller.signal)) {
      run.text += chunk.choices?.[0]?.delta?.content ?? "";
      run.reason = chunk.choices?.[0]?.finish_reason ?? run.reason;
      page.take(chunk);
    }
  } catch (caught) {
    error = caught;
  }
  page.finish();
  turn.view.calm();

  if (running !== controller) return; // the talk was ended meanwhile
  running = null;
  setBusy(false);
  conclude(turn, run, error);
}

function conclude(turn, run, error) {
  const { view, runs } = turn;
  const isStopped = error?.name === "AbortError";
  if (isStopped) run.reason = "stopped";
  else if (error !== null) run.reason = "failed";

  if (run.text !== "") turn.text = run.text;
  if (run.tally.numTokens === 0 && turn.text !== run.text) view.revert();
  if (run.tally.numTokens > 0) {
    runs.push(run);
    view.runs.append(made("p", "", lineOf(run)));
  }
  nameBars(run.tally);

  if (error?.status === 401) {
    view.fail("This question waits for an API key.");
    locked = { turn, drafting: run.drafting };
    askForKey();
  } else if (error !== null && !isStopped) {
    view.fail(error.message, () => tryAgain(turn, run.drafting));
    say("Failed");
  } else {
    finishTurn(turn, run);
  }
  keepUp();
}

function finishTurn(turn, run) {
  const { view } = turn;
  const words = run.reason === "stopped" ? "Stopped" : "Finished";
  say(`${words}: ${run.tally.numTokens} tokens`);

  const comparison = comparisonOf(turn);
  view.runs.querySelector(".verdict")?.remove();
  if (comparison !== null) view.runs.append(made("p", "verdict", comparison));

  const [other, offer] =
    run.drafting === "off" ? ["auto", "Again with drafting"] : ["off", "Again without drafting"];
  view.offer(offer, () => answer(turn, other));
}

/** What failed is asked again as the controls say now, unless it is to be compared. */
function tryAgain(turn, drafting) {
  const isCompared = wholeRuns(turn).length > 0;
  if (!isCompared) turn.settings = settingsNow();
  answer(turn, isCompared ? drafting : draftingNow());
}

/** Shows an answer at most once a frame, however fast it comes. */
class Painter {
  #view;
  #tally;
  #chunks = [];
  #isPlanned = false;
  #hasBegun = false;
  #marks = new Marks();

  constructor(view, tally) {
    this.#view = view;
    this.#tally = tally;
  }

  take(chunk) {
    const now = performance.now();
    const step = chunk.flashdraft;
    if (step) {
      const numAccepted = step.pieces.filter((piece) => piece.origin === "drafted").length;
      this.#tally.add(step.pieces.length, step.num_drafted, numAccepted, now);
    } else if (chunk.choices?.[0]?.delta?.content) {
      this.#tally.note(now);
    }
    if (chunk.usage) this.#tally.settle(chunk.usage);

    this.#chunks.push(chunk);
    if (this.#isPlanned) return;
    this.#isPlanned = true;
    if (document.hidden) setTimeout(() => this.finish(), 250);
    else requestAnimationFrame(() => this.finish());
  }

  /** Show all that has come. */
  finish() {
    this.#isPlanned = false;
    const chunks = this.#chunks;
    this.#chunks = [];
    if (chunks.length === 0) return;
    for (const chunk of chunks) this.#show(chunk);
    if (!this.#hasBegun && this.#tally.numTokens > 0) {
      this.#hasBegun = true;
      say("Writing");
    }
    showFigures(this.#tally);
    keepUp();
  }

  #show(chunk) {
    if (chunk.flashdraft) this.#marks.add(chunk.flashdraft);
    const delta = chunk.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning_content ?? "";
    const said = delta.content ?? "";
    if (thought !== "") this.#view.think(this.#marks.take(thought));
    if (said !== "") this.#view.say(this.#marks.take(said));
  }
}

/**
 * Which of the answer's text came from where. The server tells every step's tokens as they are; of
 * the text it may hold a part back, or leave a tag out.
 */
class Marks {
  #waiting = []; // pieces of tokens whose text has not come yet: {text, mark, rejected}

  add(step) {
    const own = step.num_drafted > 0 ? "own" : null; // without a draft there is nothing to mark
    for (const { text, origin } of step.pieces) {
      const isDrafted = origin === "drafted";
      const rejected = isDrafted ? [] : step.rejected;
      this.#waiting.push({ text, mark: isDrafted ? "drafted" : own, rejected });
    }
  }

  /** This text as pieces; as one without a mark where no tokens of it are known. */
  take(text) {
    const told = this.#waiting.map((piece) => piece.text).join("");
    const start = told.indexOf(text);
    if (start === -1) {
      this.#waiting = [];
      return [{ text, mark: null, rejected: [] }];
    }
    this.#cut(start);
    return this.#cut(text.length);
  }

  /** The next pieces, of so many characters; the last may be a part of a token. */
  #cut(length) {
    const pieces = [];
    let left = length;
    while (this.#waiting.length > 0 && left >= this.#waiting[0].text.length) {
      const piece = this.#waiting.shift();
      pieces.push(piece);
      left -= piece.text.length;
    }
    if (left > 0) {
      const piece = this.#waiting[0];
      pieces.push({ ...piece, text: piece.text.slice(0, left) });
      this.#waiting[0] = { ...piece, text: piece.text.slice(left), rejected: [] };
    }
    return pieces;
  }
}

// --- Following the text ---

function follow(isWanted) {
  isFollowing = isWanted;
  find("to-end").hidden = isWanted || running === null;
  keepUp();
}

function keepUp() {
  if (isFollowing) scrollTo(0, document.documentElement.scrollHeight);
}

function noteScroll() {
  const { scrollHeight, clientHeight } = document.documentElement;
  isFollowing = scrollHeight - clientHeight - scrollY < NEAR;
  find("to-end").hidden = isFollowing || running === null;
}

// --- The key ---

async function loadModel() {
  const name = await modelName(keyNow());
  find("model").textContent = name;
  return name;
}

function askForKey() {
  const wasRefused = keyNow() !== "";
  const words = wasRefused ? "The server refused this API key." : "This server wants an API key.";
  find("lock-words").textContent = words;
  find("lock").hidden = false;
  say("Locked");
  find("key").value = "";
  find("key").focus();
}

async function unlock(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value.trim());
  find("lock").hidden = true;
  find("forget").hidden = false;
  focusPrompt();
  await greet();
  if (locked === null || model === null) return;
  const { turn, drafting } = locked;
  locked = null;
  await answer(turn, drafting);
}

function forget() {
  sessionStorage.removeItem(KEY);
  find("forget").hidden = true;
  say("The key is forgotten");
}

/** Learn the model's name, or that a key is needed. */
async function greet() {
  try {
    model = await loadModel();
    say("Ready");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForKey();
    else say(error.message);
  }
}

// --- The person ---

function setBusy(isBusy) {
  const hadFocus = find("stop") === document.activeElement;
  find("send").hidden = isBusy;
  find("stop").hidden = !isBusy;
  if (hadFocus && !isBusy) focusPrompt();
  if (isBusy) say("Reading the prompt");
  if (!isBusy) find("to-end").hidden = true;
}

function focusPrompt() {
  const wouldRaiseKeyboard = matchMedia("(pointer: coarse)").matches; // over the answer, on a phone
  if (!wouldRaiseKeyboard) find("prompt").focus();
}

function send(event) {
  event.preventDefault();
  const field = find("prompt");
  const prompt = field.value.trim();
  if (prompt === "" || running !== null) return;
  field.value = "";
  ask(prompt);
}

function showSettings(isWanted) {
  find("settings").hidden = !isWanted;
  find("more").setAttribute("aria-expanded", isWanted);
}

function stop() {
  running?.abort();
}

function restart() {
  stop();
  running = null;
  locked = null;
  setBusy(false);
  turns.length = 0;
  find("talk").replaceChildren();
  find("intro").hidden = false;
  const nothing = new Tally(0);
  showFigures(nothing);
  nameBars(nothing);
  say("Ready");
  focusPrompt();
}

function onKey(event) {
  if (event.key === "Escape") stop();
}

function onPromptKey(event) {
  const isComposing = event.isComposing || event.keyCode === 229; // Enter takes a suggestion
  if (event.key !== "Enter" || event.shiftKey || isComposing) return;
  event.preventDefault();
  find("composer").requestSubmit();
}

find("composer").addEventListener("submit", send);
find("composer").addEventListener("invalid", () => showSettings(true), true); // hidden, it can't tell
find("more").addEventListener("click", () => showSettings(find("settings").hidden));
find("prompt").addEventListener("keydown", onPromptKey);
find("stop").addEventListener("click", stop);
find("new").addEventListener("click", restart);
find("to-end").addEventListener("click", () => follow(true));
find("lock").addEventListener("submit", unlock);
find("forget").addEventListener("click", forget);
find("marks").addEventListener("change", (event) => {
  find("talk").dataset.marks = event.target.checked ? "on" : "off";
  find("legend").hidden = !event.target.checked;
  keepUp();
});
for (const idea of document.querySelectorAll(".idea")) {
  idea.addEventListener("click", () => {
    find("prompt").value = idea.textContent;
    find("composer").requestSubmit();
  });
}
document.addEventListener("keydown", onKey);
addEventListener("scroll", noteScroll, { passive: true });

drawBars([]);
find("forget").hidden = keyNow() === "";
greet();
