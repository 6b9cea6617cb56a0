"use strict";
// Plays the events of a replay. Everything that is shown as text goes through textContent.

const OPEN = -1;
const COMMIT = 0, REMASK = 1, REPLACE = 2, INSERT = 3, TRUNCATE = 4, DELETE = 5;
const SCALE = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];

// Which events belong to a token that was written and taken back in one step, so that it never stood.
function passing(events) {
  const written = new Map(), found = new Array(events.step.length).fill(false);
  events.kind.forEach((kind, i) => {
    const place = `${events.step[i]}:${events.position[i]}`;
    if (kind === COMMIT) written.set(place, i);
    else if (kind === REMASK && written.has(place)) found[i] = found[written.get(place)] = true;
  });
  return found;
}

// The slots of a row when `steps` steps have been made. `history` holds indices of the events about the slot.
function slotsAfter(row, steps) {
  const slots = row.start.map((token) => ({ token, step: -1, event: -1, mark: "", history: [], changed: false }));
  const events = row.events, fleeting = passing(events);
  for (let i = 0; i < events.step.length && events.step[i] < steps; i++) {
    const at = events.position[i], step = events.step[i], last = step === steps - 1;
    if (events.kind[i] === TRUNCATE) {
      slots.length = Math.min(slots.length, at);
    } else if (events.kind[i] === DELETE) {
      slots.splice(at, 1);
    } else if (events.kind[i] === INSERT) {
      const mark = last ? "inserted" : "";
      slots.splice(at, 0, { token: events.token[i], step: -1, event: -1, mark, history: [i], changed: false });
    } else {
      const slot = slots[at], remask = events.kind[i] === REMASK;
      slot.token = remask ? OPEN : events.token[i];
      slot.step = remask ? -1 : step;
      slot.event = remask ? -1 : i;
      slot.history.push(i);
      if (fleeting[i]) continue;
      slot.changed ||= events.kind[i] !== COMMIT;
      if (last) slot.mark = remask ? "remasked" : events.kind[i] === REPLACE ? "replaced" : "written";
    }
  }
  return slots;
}

// The block [start, stop) that was active in the last of `steps` steps, or null where that was not recorded.
function blockAt(row, steps) {
  let active = null;
  for (const [first, start, stop] of row.blocks) {
    if (active === null || first < steps) active = [start, stop];
  }
  return active;
}

// How many slots each step wrote for more than itself, and how many it took back or changed.
function counts(row) {
  const written = new Array(row.steps).fill(0), changed = new Array(row.steps).fill(0), fleeting = passing(row.events);
  row.events.step.forEach((step, i) => {
    if (!fleeting[i]) (row.events.kind[i] === COMMIT ? written : changed)[step] += 1;
  });
  return { written, changed };
}

function shade(value) {
  const index = Math.min(SCALE.length - 1, Math.max(0, Math.floor(value * SCALE.length)));
  return [SCALE[index], index < SCALE.length / 2 ? "#ffffff" : "#000000"];
}

function show() {
  const replay = JSON.parse(document.getElementById("replay").textContent);
  const at = (id) => document.getElementById(id);
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  let row = replay.rows[0], slots = [], pinned = -1, timer = 0;
  const text = (token) => (token === OPEN ? "(open)" : replay.texts[token]);
  const column = (name, i) => (row.events[name] ? row.events[name][i] : null);
  const confidence = (i) => column("confidence", i) ?? column("probability", i);

  function colourOf(slot) {
    if (slot.event < 0) return null;
    if (at("colour").value === "step") return shade(slot.step / Math.max(1, row.steps - 1));
    return at("colour").value === "confidence" && confidence(slot.event) !== null ? shade(confidence(slot.event)) : null;
  }

  function draw() {
    const steps = Number(at("step").value), block = blockAt(row, steps), pieces = [];
    slots = slotsAfter(row, steps);
    slots.forEach((slot, position) => {
      const piece = make("span", slot.token === OPEN ? "" : text(slot.token).replaceAll("\n", "\u21b5\n"), "slot");
      piece.dataset.position = position;
      if (slot.token === OPEN) piece.classList.add("open");
      else if (slot.event < 0) piece.classList.add("given");
      if (block && position >= block[0] && position < block[1]) piece.classList.add("active");
      if (slot.mark) piece.classList.add(slot.mark);
      if (slot.changed) piece.classList.add("changed");
      if (position === pinned) piece.classList.add("pinned");
      const colour = colourOf(slot);
      if (colour) [piece.style.background, piece.style.color] = colour;
      pieces.push(piece);
    });
    at("canvas").replaceChildren(...pieces);
    const open = slots.filter((slot) => slot.token === OPEN).length, said = [];
    const happened = [0, 0, 0, 0, 0, 0], fleeting = passing(row.events);
    let tried = 0;
    row.events.step.forEach((step, i) => {
      if (step !== steps - 1) return;
      if (!fleeting[i]) happened[row.events.kind[i]] += 1;
      else if (row.events.kind[i] === COMMIT) tried += 1;
    });
    said.push(`step ${steps} of ${row.steps}`, `NFE ${Math.floor(row.nfe * steps / Math.max(1, row.steps))} of ${row.nfe}`);
    if (block) said.push(`block ${block[0]}\u2013${block[1] - 1}`);
    said.push(`${open} of ${slots.length} open`);
    ["written", "masked again", "replaced", "put in"].forEach((word, kind) => {
      if (happened[kind]) said.push(`${happened[kind]} ${word}`);
    });
    if (tried) said.push(`${tried} tried, not kept`);
    if (happened[DELETE]) said.push(`${happened[DELETE]} taken out`);
    if (happened[TRUNCATE]) said.push("the rest was cut off");
    if (steps === row.steps) said.push(`ended: ${row.stop_reason}`);
    at("status").textContent = said.join(" \u00b7 ");
    describe(pinned);
    chart(steps);
  }

  function chart(steps) {
    const area = at("chart"), { written, changed } = counts(row);
    area.width = area.clientWidth * (window.devicePixelRatio || 1);
    const pen = area.getContext("2d"), wide = area.width / Math.max(1, row.steps);
    const style = getComputedStyle(document.documentElement);
    const most = Math.max(1, ...written.map((count, i) => count + changed[i]));
    pen.clearRect(0, 0, area.width, area.height);
    written.forEach((count, i) => {
      const high = (count / most) * area.height, red = (changed[i] / most) * area.height;
      const bar = Math.max(1, wide - 1);
      pen.globalAlpha = i < steps ? 1 : 0.35;
      pen.fillStyle = style.getPropertyValue("--block");
      pen.fillRect(i * wide, area.height - high, bar, high);
      pen.fillStyle = style.getPropertyValue("--remasked");
      pen.fillRect(i * wide, area.height - high - red, bar, red);
    });
  }

  function describe(position) {
    const slot = slots[position], area = at("slot");
    area.hidden = !slot;
    if (!slot) return;
    const head = make("div"), list = make("ol"), origin = slot.token !== OPEN && slot.event < 0 ? ", given" : "";
    head.append(`slot ${position}: `, make("b", JSON.stringify(text(slot.token))));
    head.append(slot.token === OPEN ? "" : ` (token ${slot.token}${origin})`);
    slot.history.forEach((i) => {
      const entry = make("li"), kind = row.events.kind[i], token = row.events.token[i];
      const verb = ["wrote", "masked again", "replaced by", "put in"][kind];
      entry.append(`step ${row.events.step[i] + 1}: ${verb} `, make("b", JSON.stringify(text(token))));
      if (token !== OPEN) entry.append(` (token ${token})`);
      for (const [name, label] of [
        ["probability", "probability"], ["drawn", "as drawn"], ["confidence", "confidence"],
      ]) {
        const value = column(name, i);
        if (value !== null && value !== undefined) entry.append(`, ${label} ${value}`);
      }
      list.append(entry);
    });
    area.replaceChildren(head, list);
  }

  function legend() {
    const name = at("colour").value, scale = make("canvas");
    scale.id = "scale";
    [scale.width, scale.height] = [96, 10];
    const pen = scale.getContext("2d");
    SCALE.forEach((colour, i) => { pen.fillStyle = colour; pen.fillRect(i * 12, 0, 12, 10); });
    const parts = name === "none" ? [] : name === "step" ? ["early", scale, "late"] : ["unsure", scale, "sure"];
    for (const [kind, sample, word] of [
      ["open", "", "open"], ["active", "a", "active block"], ["written", "a", "just written"],
      ["open remasked", "", "masked again"], ["replaced", "a", "replaced"], ["inserted", "a", "put in"],
      ["changed", "a", "was changed before"], ["given", "a", "given"],
    ]) {
      parts.push(make("span", sample, `slot ${kind}`), word);
    }
    at("legend").replaceChildren(...parts);
  }

  function choose(number) {
    stop();
    row = replay.rows.find((candidate) => candidate.row === number) ?? replay.rows[0];
    at("row").value = String(row.row);
    at("prompt").textContent = row.prompt;
    at("completion").textContent = row.completion;
    at("step").max = String(row.steps);
    at("step").value = "0";
    pinned = -1;
    draw();
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    at("play").textContent = "Play";
  }

  function play() {
    if (timer) return stop();
    if (Number(at("step").value) >= row.steps) at("step").value = "0";
    at("play").textContent = "Pause";
    timer = setInterval(() => {
      move(1);
      if (Number(at("step").value) >= row.steps) stop();
    }, 1000 / Number(at("speed").value));
    draw();
  }

  function move(by) {
    at("step").value = String(Number(at("step").value) + by);
    draw();
  }

  const about = [`schedule ${replay.schedule}`, `cache ${replay.cache}`, `seed ${replay.seed}`];
  if (!replay.exact) about.push("log-probabilities are approximate");
  if (replay.weight_version !== null) about.push(`weights after step ${replay.weight_version}`);
  at("about").textContent = about.join(" \u00b7 ");
  for (const one of replay.rows) {
    const notes = Object.entries(one.notes).map(([name, value]) => `${name} ${value}`);
    const words = [`${one.row}`, `${one.steps} steps`, `NFE ${one.nfe}`, one.stop_reason, ...notes];
    if (one.extra_forwards) words.splice(3, 0, `${one.extra_forwards} forwards of other models`);
    const option = make("option", words.join(" \u00b7 "));
    option.value = String(one.row);
    at("row").append(option);
  }
  const hash = () => Number((/^#row-(\d+)$/.exec(location.hash) ?? [])[1] ?? replay.rows[0].row);
  at("row").addEventListener("change", () => { location.hash = `row-${at("row").value}`; });
  window.addEventListener("hashchange", () => choose(hash()));
  window.addEventListener("resize", draw);
  at("step").addEventListener("input", () => { stop(); draw(); });
  at("colour").addEventListener("change", () => { legend(); draw(); });
  at("speed").addEventListener("change", () => { if (timer) { stop(); play(); } });
  at("play").addEventListener("click", play);
  at("back").addEventListener("click", () => { stop(); move(-1); });
  at("forward").addEventListener("click", () => { stop(); move(1); });
  at("canvas").addEventListener("mouseover", (event) => {
    if (event.target.dataset.position !== undefined) describe(Number(event.target.dataset.position));
  });
  at("canvas").addEventListener("mouseleave", () => describe(pinned));
  at("canvas").addEventListener("click", (event) => {
    const position = Number(event.target.dataset.position ?? -1);
    pinned = position === pinned ? -1 : position;
    draw();
  });
  document.addEventListener("keydown", (event) => {
    if (["SELECT", "INPUT", "BUTTON", "SUMMARY"].includes(event.target.tagName)) return;
    const action = { " ": play, ArrowLeft: () => { stop(); move(-1); }, ArrowRight: () => { stop(); move(1); } }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  legend();
  choose(hash());
}

if (typeof document !== "undefined") show();
