// What the browser keeps: settings in localStorage, conversations with their pictures in IndexedDB.
"use strict";
const settings = Object.assign(
  {language: "", key: "", system: "", temperature: "", length: 512, answer: false, models: [], compare: false},
  (() => { try { return JSON.parse(localStorage.getItem("seavlm.settings")); } catch { return null; } })(),
);
function keepSettings() {
  try { localStorage.setItem("seavlm.settings", JSON.stringify(settings)); } catch { /* they last as long as the page */ }
}

// The conversation that this tab shows.
function current(id) {
  try { return id ? sessionStorage.setItem("seavlm.talk", id) : sessionStorage.getItem("seavlm.talk"); } catch { return null; }
}

const opened = new Promise((done, fail) => {
  const asked = indexedDB.open("seavlm", 1);
  asked.onupgradeneeded = () => { asked.result.createObjectStore("heads", {keyPath: "id"}); asked.result.createObjectStore("turns"); };
  asked.onsuccess = () => done(asked.result);
  asked.onerror = () => fail(asked.error);
});
opened.catch(() => { /* a browser that keeps nothing: the talk goes on, unsaved */ });

// One transaction: what `work` asks of the two stores is done, all or nothing; then its result comes.
async function stored(mode, work) {
  const all = (await opened).transaction(["heads", "turns"], mode);
  const asked = work(all.objectStore("heads"), all.objectStore("turns"));
  return new Promise((done, fail) => {
    all.oncomplete = () => done(asked?.result);
    all.onabort = all.onerror = event => fail(all.error ?? event.target.error);
  });
}

const chats = {
  async list() {
    const heads = await stored("readonly", heads => heads.getAll()).catch(() => []);
    return heads.sort((one, other) => other.at - one.at);
  },
  turns: id => stored("readonly", (_, turns) => turns.get(id)).catch(() => undefined),
  remove: id => stored("readwrite", (heads, turns) => { heads.delete(id); turns.delete(id); }).catch(() => {}),

  // True when it is kept. If there is no room, pictures of the oldest conversations go, as many as are needed
  // and no more, as a browser may give the room back only later; failing that, its own. No word is lost.
  freed: 0,
  async save(talk) {
    const {id, at, title, turns} = structuredClone(talk), bytes = sizeOf(turns);
    const put = turns => stored("readwrite", (heads, all) => { heads.put({id, at, title, bytes: sizeOf(turns)}); all.put(turns, id); })
      .then(() => true, error => { if (error?.name !== "QuotaExceededError") throw error; return false; });
    try {
      while (!await put(turns)) {
        const oldest = (await chats.list()).filter(head => head.bytes && head.id !== id).pop();
        if (!oldest || chats.freed >= bytes) return await put(bare(turns));
        await chats.strip(oldest);
        chats.freed += oldest.bytes;
      }
      chats.freed = 0;
      return true;
    } catch { return false; }
  },
  async strip(head) {
    const turns = await chats.turns(head.id) ?? [];
    await chats.remove(head.id); // first, as what is removed needs no room
    await stored("readwrite", (heads, all) => { heads.put({...head, bytes: 0}); all.put(bare(turns), head.id); });
  },
};
const bare = turns => turns.map(turn => ({...turn, files: turn.files.map(file => ({...file, url: ""}))}));
const sizeOf = turns => turns.flatMap(turn => turn.files).reduce((sum, file) => sum + file.url.length, 0);
