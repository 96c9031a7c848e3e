// The chat. What is on the screen is drawn from `talk`: its turns, each a question and the reply of every model
// that was asked. words.js, store.js and markdown.js come before.
"use strict";
const $ = id => document.getElementById(id);
const say = (word, number) => (WORDS[language][word] ?? WORDS.en[word]).replace("{}", number);
const afresh = () => ({id: Date.now() + "-" + Math.random().toString(36).slice(2), at: Date.now(), title: "", turns: []});
let language = [settings.language, ...navigator.languages.map(code => code.split("-")[0].replace("fil", "tl")), "en"].find(code => WORDS[code]);
let talk = afresh();
let files = []; // of the question being written: {kind: "image" or "pdf", name, url}
let edited = null; // the number of the turn that is being written anew
let running = null; // what stops the replies under way
let models = [];

// --- words

function speak() {
  document.documentElement.lang = language;
  for (const part of document.querySelectorAll("[data-say]")) part.textContent = say(part.dataset.say);
  for (const part of document.querySelectorAll("[data-label], [data-name]")) {
    part.ariaLabel = say(part.dataset.label ?? part.dataset.name);
    if (part.localName === "button") part.title = part.ariaLabel;
    if (part.dataset.name) part.dataset.text = part.ariaLabel;
  }
  $("text").placeholder = say("question");
  show();
  draft();
}
// A screen reader says this, once: a reply when it is whole, not each token of it.
function tell(...texts) {
  $("news").replaceChildren(...texts.map(text => make("p", {textContent: text, lang: languageOf(text) || language})));
}

// --- the conversation

function show() {
  $("talk").replaceChildren(...talk.turns.map(drawTurn));
  if (!talk.turns.length) {
    const example = make("button", {textContent: say("example"), onclick: () => { $("text").value = say("example"); grow(); $("text").focus(); }});
    $("talk").append(make("div", {className: "hello"}, make("h2", {textContent: say("hello")}), example));
  }
  $("talk").scrollTop = $("talk").scrollHeight;
}
function drawTurn(turn) {
  const number = talk.turns.indexOf(turn), two = turn.replies.length > 1;
  const question = make("article", {className: "user", ariaLabel: say("you")}, make("div", {className: "shown"}, ...turn.files.map(drawFile)));
  question.classList.toggle("edited", number === edited);
  if (turn.text) question.append(make("div", {className: "said", textContent: turn.text, lang: languageOf(turn.text)}));
  question.append(make("div", {className: "tools"}, make("button", {textContent: say("edit"), onclick: () => edit(number)})));
  const replies = make("div", {className: two ? "replies two" : "replies"}, ...turn.replies.map((reply, side) => {
    const part = make("article", {className: "reply", ariaLabel: reply.model});
    if (two || models.length > 1) part.append(make("h2", {textContent: reply.model}));
    part.append(make("div", {className: "said"}), make("div", {className: "end"}), make("div", {className: "tools"}));
    return drawReply(reply, part, number, side);
  }));
  const again = two || !turn.replies.length ? make("div", {className: "tools"}, retrier(number)) : "";
  return make("section", {className: "turn"}, question, replies, again);
}
function drawReply(reply, part, number, side) {
  const [said, end, tools] = [".said", ".end", ".tools"].map(one => part.querySelector(":scope > " + one));
  markdown(reply.text, said);
  said.lang = languageOf(reply.text) || (languageOf(say("hello")) ? "" : language);
  part.ariaBusy = String(Boolean(reply.running));
  if (reply.running) return part;
  end.replaceChildren();
  if (reply.error) end.append(make("div", {className: "error"}, make("p", {textContent: reason(reply.error)}), make("p", {className: "quiet", textContent: reply.error.detail ?? ""})));
  const told = [];
  if (reply.stopped) told.push(say("stopped"));
  if (reply.cut) told.push(`${say("length")}: ${reply.cut}`);
  if (reply.first) told.push(`${(reply.first / 1000).toFixed(2)} s ${say("first")}`);
  if (reply.rate) told.push(`${reply.rate.toFixed(reply.rate < 10 ? 1 : 0)} ${say("rate")}`);
  if (told.length) end.append(make("p", {className: "quiet", textContent: told.join(" · ")}));
  tools.replaceChildren(
    ...talk.turns[number].replies.length > 1 ? [] : [retrier(number)],
    ...reply.text ? [copier(say("copy"), () => reply.text)] : [],
    copier("curl", () => curl(body(number, side, reply.model))),
    copier("Python", () => python(body(number, side, reply.model))),
  );
  return part;
}
const retrier = number => make("button", {textContent: say("retry"), onclick: () => retry(number)});
const reason = error => say(error.word, error.seconds);
function drawFile(file) {
  if (file.kind === "image" && file.url) return make("img", {src: file.url, alt: say("picture")});
  return make("span", {className: "paper", textContent: file.name || say("picture")});
}
function copier(name, text) {
  const button = make("button", {type: "button", textContent: name});
  button.onclick = async () => {
    await copy(text());
    button.textContent = say("copied");
    tell(say("copied"));
    setTimeout(() => { button.textContent = name; }, 1500);
  };
  return button;
}
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = make("textarea", {value: text}); // a page that came by http: from another machine
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

// --- asking

const sides = () => settings.compare && models.length > 1 ? settings.models.slice(0, 2) : [settings.models[0] ?? ""];
function question(turn) {
  if (!turn.files.length) return {role: "user", content: turn.text};
  const parts = turn.files.filter(file => file.url).map(({kind, name, url}) => kind === "pdf"
    ? {type: "file", file: {filename: name, file_data: url}}
    : {type: "image_url", image_url: {url}});
  return {role: "user", content: turn.text || !parts.length ? [...parts, {type: "text", text: turn.text}] : parts};
}
// What is sent for one side of a turn: each side goes on from its own replies, and what failed is left out.
function body(number, side, model) {
  const messages = [], system = [settings.system, settings.answer ? say("answer") : ""].filter(Boolean).join("\n\n");
  if (system) messages.push({role: "system", content: system});
  for (const turn of talk.turns.slice(0, number)) {
    const reply = turn.replies[side] ?? turn.replies[0];
    if (reply?.text) messages.push(question(turn), {role: "assistant", content: reply.text});
  }
  messages.push(question(talk.turns[number]));
  const found = {model, messages, max_tokens: Number(settings.length) || 512};
  if (settings.temperature !== "") found.temperature = Number(settings.temperature);
  return found;
}
const curl = asked => `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json' -H "Authorization: Bearer $SEAVLM_API_KEY" -d @- <<'END'\n${JSON.stringify(asked)}\nEND\n`;
const python = asked => `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(location.origin + "/v1")}, api_key=os.environ.get("SEAVLM_API_KEY", "none"))\nreply = client.chat.completions.create(**${JSON.stringify(asked, null, 4)})\nprint(reply.choices[0].message.content)\n`;
const headers = () => ({"Content-Type": "application/json", ...(settings.key ? {Authorization: "Bearer " + settings.key} : {})});

async function ask(number) {
  const mine = talk, turn = mine.turns[number], stopper = running = new AbortController();
  if (!models.length) await about();
  if (running !== stopper) return; // stopped, or another conversation by now
  turn.replies = sides().map(model => ({model, text: "", running: true}));
  mine.at = Date.now();
  show();
  busy();
  keep(mine);
  await Promise.all(turn.replies.map((reply, side) => stream(reply, number, side, stopper.signal)));
  keep(mine);
  if (running !== stopper) return;
  running = null;
  busy();
  tell(...turn.replies.map(reply => (turn.replies.length > 1 ? reply.model + ": " : "") + [reply.text, reply.error && reason(reply.error)].filter(Boolean).join("\n")));
}
async function stream(reply, number, side, signal) {
  const began = performance.now(), mine = talk;
  const draw = () => { // what is on the screen by now may have been drawn anew, or be another conversation
    const part = talk === mine && $("talk").children[number]?.querySelectorAll(".reply")[side];
    if (part && talk.turns[number].replies[side] === reply) follow(() => drawReply(reply, part, number, side));
  };
  const asked = {...body(number, side, reply.model), stream: true, stream_options: {include_usage: true}};
  let drawn = 0, ended = 0, tokens = 0;
  try {
    const answer = await fetch("v1/chat/completions", {method: "POST", signal, headers: headers(), body: JSON.stringify(asked)});
    if (!answer.ok) throw await refusal(answer);
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw {word: "failed", detail: chunk.error.message};
      const choice = chunk.choices[0];
      tokens = chunk.usage?.completion_tokens ?? tokens;
      if (choice?.finish_reason) ended = performance.now();
      if (choice?.finish_reason === "length") reply.cut = asked.max_tokens;
      if (!choice?.delta.content) continue;
      const now = performance.now();
      reply.first ??= now - began;
      reply.text += choice.delta.content;
      if (now - drawn > 60) { drawn = now; draw(); }
    }
    // Of what came after the first token, the one that ends the reply (and is not counted) included. A single
    // token has no speed, nor have some that came in one piece.
    const took = ended - began - reply.first;
    if (tokens > 1 && took > 5) reply.rate = (reply.cut ? tokens - 1 : tokens) / took * 1000;
  } catch (error) {
    if (signal.aborted) reply.stopped = true;
    else reply.error = error.word ? error : {word: "gone"};
  }
  delete reply.running;
  draw();
  if (reply.error?.word === "needKey") askKey();
}
async function refusal(answer) {
  const detail = (await answer.json().catch(() => ({}))).error?.message ?? `${answer.status} ${answer.statusText}`;
  const seconds = Number(answer.headers.get("Retry-After")) || 1;
  return {word: {401: "needKey", 429: "busy", 502: "gone", 503: "busy", 504: "gone"}[answer.status] ?? "failed", seconds, detail};
}
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
// Draw, and stay at the end if the end was in sight.
function follow(draw) {
  const box = $("talk"), near = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  draw();
  if (near) box.scrollTop = box.scrollHeight;
}
function busy() {
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
}
function stop() {
  if (running) tell(say("stopped"));
  running?.abort();
  running = null;
  busy();
}
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}
async function keep(some) {
  current(some.id);
  notice(await chats.save(some) ? "" : say("full"));
}
function retry(number) {
  stop();
  talk.turns.length = number + 1;
  ask(number);
  $("text").focus();
}
function edit(number) {
  edited = number;
  files = talk.turns[number].files.filter(file => file.url);
  $("text").value = talk.turns[number].text;
  show();
  draft();
  $("talk").children[number].scrollIntoView({block: "nearest"});
  $("text").focus();
}
function cancel() {
  edited = null;
  files = [];
  $("text").value = "";
  show();
  draft();
  $("text").focus();
}
$("cancel").onclick = cancel;
$("stop").onclick = () => { stop(); $("text").focus(); };
$("ask").onsubmit = event => {
  event.preventDefault();
  const text = $("text").value.trim(), number = edited ?? talk.turns.length;
  if (running || (!text && !files.length)) return;
  talk.turns.length = number;
  talk.turns.push({text, files, replies: []});
  if (!number) talk.title = text.slice(0, 80) || files[0].name;
  cancel();
  ask(number);
};

// --- the question being written

const grow = () => { $("text").style.height = "auto"; $("text").style.height = $("text").scrollHeight + 2 + "px"; };
function draft() {
  $("editing").hidden = edited === null;
  $("files").replaceChildren(...files.map((file, number) => make("figure", {}, drawFile(file), make("button", {
    type: "button", textContent: "×", ariaLabel: `${say("remove")}: ${file.name || say("picture")}`,
    onclick: () => { files.splice(number, 1); draft(); $("text").focus(); },
  }))));
  grow();
}
async function take(some) {
  notice("");
  for (const file of some) {
    try {
      files.push(await read(file));
    } catch {
      notice(`${say("unread")}: ${file.name}`);
    }
  }
  draft();
}
// Photographs are turned upright and made smaller here, and lose what else is in them, such as the place.
const LARGEST = 2048, MOST_BYTES = 40 * 2 ** 20;
async function read(file) {
  const whole = type => new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.replace(/^data:[^;,]*/, "data:" + type));
    reader.onerror = fail;
    if (file.size > MOST_BYTES) fail(); else reader.readAsDataURL(file);
  });
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) return {kind: "pdf", name: file.name, url: await whole("application/pdf")};
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {imageOrientation: "from-image"});
  } catch (error) {
    if (!/\.hei[cf]$/i.test(file.name)) throw error;
    return {kind: "image", name: file.name, url: await whole("image/heic")}; // the server may know it
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", {width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale))});
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return {kind: "image", name: file.name, url: canvas.toDataURL(scale < 1 || file.type === "image/jpeg" ? "image/jpeg" : "image/png", .92)};
}
$("text").oninput = grow;
$("text").onkeydown = event => {
  const composing = event.isComposing || event.keyCode === 229; // Enter takes a word of the input method
  if (event.key === "Enter" && !event.shiftKey && !composing) { event.preventDefault(); $("ask").requestSubmit(); }
};
document.onkeydown = event => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (running) stop(); else if (edited !== null) cancel();
};
$("pick").onclick = () => $("file").click();
$("file").onchange = async () => { const some = [...$("file").files]; $("file").value = ""; await take(some); $("text").focus(); };
document.onpaste = event => {
  const found = [...event.clipboardData.files];
  if (!found.length || event.clipboardData.types.includes("text/plain")) return; // text that brings its picture along stays text
  event.preventDefault();
  take(found);
};
const carriesFiles = event => event.dataTransfer?.types.includes("Files");
document.ondragover = event => { if (carriesFiles(event)) { event.preventDefault(); document.body.classList.add("drop"); } };
document.ondragleave = event => { if (!event.relatedTarget) document.body.classList.remove("drop"); };
document.ondrop = event => {
  document.body.classList.remove("drop");
  if (carriesFiles(event)) { event.preventDefault(); take([...event.dataTransfer.files]); }
};

// --- conversations, languages, models, settings

async function kept(head) {
  const turns = await chats.turns(head.id) ?? [];
  for (const reply of turns.flatMap(turn => turn.replies)) if (reply.running) { delete reply.running; reply.stopped = true; }
  return {...head, turns};
}
function open(some) {
  stop();
  talk = some;
  current(talk.id);
  cancel();
}
$("fresh").onclick = () => open(afresh());
async function listChats() {
  $("chats").replaceChildren(...(await chats.list()).map(head => {
    const name = head.title || say("picture");
    const button = make("button", {textContent: name, title: name, lang: languageOf(name), onclick: async () => {
      $("history").close();
      open(await kept(head));
    }});
    if (head.id === talk.id) button.ariaCurrent = "true";
    return make("li", {}, button, make("button", {textContent: "×", ariaLabel: `${say("remove")}: ${name}`, title: say("remove"), onclick: async () => {
      if (!confirm(say("sure"))) return;
      if (head.id === talk.id) open(afresh());
      await chats.remove(head.id);
      await listChats();
      $("history").querySelector("button").focus();
    }}));
  }));
}
$("menu").onclick = async () => { await listChats(); $("history").showModal(); };

for (const [code, words] of Object.entries(WORDS)) $("language").append(make("option", {value: code, textContent: words._, lang: code, selected: code === language}));
$("language").onchange = () => { language = settings.language = $("language").value; keepSettings(); speak(); };

const ASKED = ["key", "system", "temperature", "length"];
function openSettings() {
  for (const name of ASKED) $(name).value = settings[name];
  $("answer").checked = settings.answer;
  if (!$("settings").open) $("settings").showModal();
}
function askKey() {
  openSettings();
  $("why").hidden = false;
  $("key").focus();
}
$("options").onclick = openSettings;
$("settings").onclose = () => {
  for (const name of ASKED) settings[name] = $(name).value;
  settings.answer = $("answer").checked;
  $("why").hidden = true;
  keepSettings();
  about();
};

async function about() {
  try {
    const answer = await fetch("v1/models", {headers: headers()});
    if (answer.status === 401) return askKey();
    models = (await answer.json()).data.map(one => one.id);
  } catch { return; }
  const [one, other] = settings.models.map(name => models.includes(name) && name);
  settings.models = [one || models[0], other || models.find(name => name !== (one || models[0]))];
  for (const [side, id] of ["model", "other"].entries()) {
    $(id).replaceChildren(...models.map(name => make("option", {value: name, textContent: name, selected: name === settings.models[side]})));
    $(id).onchange = () => { settings.models[side] = $(id).value; chosen(); };
  }
  chosen();
  if (!running) show();
}
function chosen() {
  keepSettings();
  $("models").hidden = models.length < 2;
  $("title").classList.toggle("gone", models.length > 1);
  $("title").textContent = models.length > 1 ? "seavlm" : models[0];
  $("other").hidden = !settings.compare;
  $("compare").ariaPressed = String(settings.compare);
  document.title = sides().join(" · ") + " · seavlm";
}
$("compare").onclick = () => { settings.compare = !settings.compare; chosen(); };

async function begin() {
  const id = current(), head = id && (await chats.list()).find(one => one.id === id);
  if (head) talk = await kept(head);
  speak();
  await about();
  if (matchMedia("(pointer: fine)").matches && !$("settings").open) $("text").focus();
}
begin();
