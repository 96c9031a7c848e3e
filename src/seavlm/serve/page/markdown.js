// Markdown becomes elements, never HTML: what a model writes cannot become a part of this page.
"use strict";
function make(tag, about = {}, ...inside) {
  const part = Object.assign(document.createElement(tag), about);
  part.append(...inside);
  return part;
}

const ITEM = /^(\s*)([-*+•]|[0-9]{1,9}[.)])\s+(.*)/, FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/, RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/, QUOTE = /^\s{0,3}> ?/;
const DASHES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

// Draws a text again as it grows: blocks that are as they were stay, selection and all.
function markdown(text, into) {
  const found = blocks(text);
  found.forEach(([source, draw], at) => {
    const old = into.childNodes[at];
    if (old?.source === source) return;
    const part = draw();
    part.source = source;
    if (old) old.replaceWith(part); else into.append(part);
  });
  while (into.childNodes.length > found.length) into.lastChild.remove();
}

// The blocks of a text, each as its source and the function that draws it.
function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), found = [];
  let at = 0;
  const isTable = () => lines[at].includes("|") && DASHES.test(lines[at + 1] ?? "") && lines[at + 1].includes("|");
  const begins = () => FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at]) || QUOTE.test(lines[at]) || ITEM.test(lines[at]) || isTable();
  const take = more => { const from = at++; while (at < lines.length && more(lines[at])) at++; return lines.slice(from, at); };
  const put = (some, draw) => found.push([some.join("\n"), () => draw(some)]);
  while (at < lines.length) {
    const line = lines[at], fence = FENCE.exec(line), heading = HEADING.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const end = new RegExp(`^\\s{0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const some = take(next => !end.test(next));
      if (at < lines.length) some.push(lines[at++]); // otherwise it is still being written
      put(some, () => code(some.slice(1, end.test(some.at(-1)) && some.length > 1 ? -1 : undefined).join("\n"), fence[2].trim()));
    } else if (heading) { at++; put([line], () => make("h" + Math.min(6, heading[1].length + 2), {}, ...inline(heading[2]))); }
    else if (RULE.test(line)) { at++; put([line], () => make("hr")); }
    else if (QUOTE.test(line)) put(take(next => QUOTE.test(next)), some => nested("blockquote", some.map(one => one.replace(QUOTE, ""))));
    else if (isTable()) put(take(next => next.includes("|")), table);
    else if (ITEM.test(line)) {
      // Items of the same kind, what is indented, and lines that just go on.
      const kind = /^\s*\d/.test(line), within = next => /^\s{2,}\S/.test(next) || (ITEM.test(next) && /^\s*\d/.test(next) === kind);
      put(take(next => within(next) || (next.trim() ? lines[at - 1].trim() && !begins() : within(lines[at + 1] ?? ""))), list);
    } else put(take(next => next.trim() && !begins()), some => make("p", {}, ...inline(some.join("\n"))));
  }
  return found;
}
function nested(tag, lines) {
  const part = make(tag);
  markdown(lines.join("\n"), part);
  return part;
}
function list(lines) {
  const [, indent, sign] = ITEM.exec(lines[0]), items = [], box = make(/\d/.test(sign) ? "ol" : "ul");
  if (box.localName === "ol") box.start = parseInt(sign, 10);
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length) items.push([item[3]]);
    else items.at(-1).push(line.replace(new RegExp(`^\\s{0,${indent.length + sign.length + 1}}`), ""));
  }
  for (const item of items) {
    const part = nested("li", item);
    if (part.firstChild?.localName === "p") part.firstChild.replaceWith(...part.firstChild.childNodes);
    box.append(part);
  }
  return box;
}
function table([head, dashes, ...rows]) {
  const cells = line => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(dashes).map(cell => cell.endsWith(":") ? cell.startsWith(":") ? "center" : "right" : "");
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell, at) => {
    const part = make(tag, {}, ...inline(cell));
    part.style.textAlign = sides[at] ?? "";
    return part;
  }));
  const body = make("tbody", {}, ...rows.map(line => row(line, "td")));
  return make("div", {className: "wide", tabIndex: 0}, make("table", {}, make("thead", {}, row(head, "th")), body));
}
function code(text, kind) {
  const bar = make("div", {className: "bar"}, make("span", {textContent: kind}), copier(say("copy"), () => text));
  return make("div", {className: "code"}, bar, make("pre", {tabIndex: 0}, make("code", {textContent: text})));
}

// `code`, **strong**, *emphasis*, ~~struck~~, [text](address), an address, an escaped sign.
const INLINE = /(`+)(.+?)\1(?!`)|(\*\*|__|~~)(?=\S)(.+?)\3(?!\*)|\*(?=\S)([^*\n]+?)\*|(?<![\p{L}\p{N}])_(?=\S)([^_\n]+?)_(?![\p{L}\p{N}])|!?\[([^[\]\n]*)\]\(\s*<?([^\s()<>]+)>?[^()\n]*\)|(https?:\/\/[^\s<>"]*[\p{L}\p{N}/])|\\([!-/:-@[-`{-~])/su;
function inline(text) {
  const found = [];
  for (let hit; (hit = INLINE.exec(text)); text = text.slice(hit.index + hit[0].length)) {
    plain(text.slice(0, hit.index), found);
    const [whole, , quoted, mark, marked, italic, slanted, label, address, bare, escaped] = hit;
    if (quoted) found.push(make("code", {textContent: quoted.trim()}));
    else if (mark) found.push(make(mark === "~~" ? "s" : "strong", {}, ...inline(marked)));
    else if (italic ?? slanted) found.push(make("em", {}, ...inline(italic ?? slanted)));
    else if (address) found.push(link(address, label ? inline(label) : [address], whole));
    else if (bare) found.push(link(bare, [bare], bare));
    else found.push(escaped);
  }
  plain(text, found);
  return found;
}
function link(address, label, otherwise) {
  if (!/^https?:\/\//i.test(address)) return otherwise; // javascript: and the like stay text
  return make("a", {href: address, target: "_blank", rel: "noopener noreferrer nofollow"}, ...label);
}
function plain(text, into) {
  text.split("\n").forEach((line, at) => { if (at) into.push(make("br")); if (line) into.push(line); });
}
