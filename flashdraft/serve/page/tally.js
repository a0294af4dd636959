// What the steps of one answer add up to. Knows counts and times; shows nothing.

export class Tally {
  numTokens = 0;
  numPasses = 0; // of the target, after the one that read the prompt
  numDrafted = 0;
  numAccepted = 0;
  accepted = []; // by position in the draft: in how many steps the draft was right so far
  numDrafts = 0; // steps with a draft
  #asked;
  #first = null; // when the first token was there, milliseconds
  #last = null;

  constructor(now) {
    this.#asked = now;
  }

  /** One step: how many tokens it gave, how many were drafted, how many of these were accepted. */
  add(numTokens, numDrafted, numAccepted, now) {
    if (numTokens === 0) return;
    this.#last = now;
    this.numTokens += numTokens;
    if (this.#first === null) {
      this.#first = now; // the prompt's own pass gives the first token
      return;
    }

    this.numPasses += 1;
    this.numDrafted += numDrafted;
    this.numAccepted += numAccepted;
    if (numDrafted > 0) this.numDrafts += 1;
    for (let position = 0; position < numAccepted; position++) {
      this.accepted[position] = (this.accepted[position] ?? 0) + 1;
    }
  }

  /** Text came, of a server that sends no steps. */
  note(now) {
    this.#first ??= now;
    this.#last = now;
  }

  /** The server's own sums at the end: they also hold drafts behind the end of the text. */
  settle(usage) {
    if (this.numTokens === 0) this.numTokens = usage.completion_tokens;
    const details = usage.completion_tokens_details;
    if (!details) return;
    this.numAccepted = details.accepted_prediction_tokens;
    this.numDrafted = this.numAccepted + details.rejected_prediction_tokens;
  }

  /** Tokens per second behind the first one; null while there is nothing to measure. */
  get speed() {
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0 && this.numTokens > 1 ? (this.numTokens - 1) / seconds : null;
  }

  /** Seconds from the question to the first token, or null. */
  get wait() {
    return this.#first === null ? null : (this.#first - this.#asked) / 1000;
  }

  /** Tokens per pass of the target, or null. */
  get tau() {
    return this.numPasses > 0 ? (this.numTokens - 1) / this.numPasses : null;
  }

  /** The share of drafted tokens that were accepted, or null. */
  get acceptance() {
    return this.numDrafted > 0 ? this.numAccepted / this.numDrafted : null;
  }

  /** By position in the draft: the share of drafts that were accepted so far. */
  get byPosition() {
    return this.accepted.map((count) => count / this.numDrafts);
  }
}
