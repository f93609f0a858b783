// Draws the conversation of scripts/answering/chat_page.py into Gradio's HTML component, which gives `element`, `props`, `watch`
// and `trigger`. All text goes in as text: nothing that a model or a user writes becomes markup.

const words = props.words[navigator.language.startsWith("zh") ? "zh" : "en"];
const main = element.querySelector("main");
const ICONS = {
    copy: "M9 9h11v11H9z M5 15H4V4h11v1",
    copied: "M4 12l6 6L20 6",
    edit: "M4 20h4L19 9l-4-4L4 16z",
    retry: "M20 5v5h-5 M19 10a8 8 0 1 0 1 5",
    undo: "M8 5L3 10l5 5 M3 10h11a6 6 0 0 1 0 11h-3",
    tool: "M14 7a4 4 0 0 0 5 5l-9 9-4-4 9-9a4 4 0 0 1 5-5l-3 3z",
};

function made(tag, className, ...children) {
    const made = document.createElement(tag);
    made.className = className;
    made.append(...children.filter(child => child)); // strings become text
    return made;
}

function icon(name) {
    const span = made("span", "icon");
    span.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
    return span;
}

function button(name, act) {
    const button = made("button", name, icon(name));
    button.type = "button";
    button.title = words[name];
    button.setAttribute("aria-label", words[name]);
    button.onclick = () => act(button);
    return button;
}

function copyButton(text) {
    return button("copy", button => {
        const area = made("textarea", "outside"); // navigator.clipboard is missing where the page comes over http
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
        button.replaceChildren(icon("copied"));
        setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    });
}

function codeBlock(language, code) {
    const head = made("figcaption", "", made("span", "", language), copyButton(code));
    return made("figure", "code", head, made("pre", "", made("code", "", code)));
}

// Text as it was written, and fenced code as blocks; the last fence may still be open.
function prose(text) {
    const parts = made("div", "prose");
    let lines = [], fence = null;
    const flush = () => {
        const text = lines.join("\n");
        if (fence) parts.append(codeBlock(fence[2].trim(), text));
        else if (text.trim()) parts.append(made("p", "", text.replace(/^\n+|\n+$/g, "")));
        lines = [];
    };
    for (const line of text.split("\n")) {
        const edge = line.match(/^\s{0,3}(`{3,}|~{3,})([^`]*)$/);
        const closes = fence && edge && edge[1].startsWith(fence[1]) && !edge[2].trim();
        if (closes || (edge && !fence)) {
            flush();
            fence = closes ? null : edge;
        } else lines.push(line);
    }
    flush();
    return parts;
}

function thought(text, done) {
    const summary = made("summary", "", done ? words.thought : words.thinking);
    return made("details", done ? "thought" : "thought running", summary, made("p", "", text.trim()));
}

// What a model answers: thinking, folded away; a call of a tool; text; why there is none; how fast it came.
function answered(message, pending) {
    const [, open, inner, close, rest] = message.content.match(/^\s*(<think>)?([^]*?)(<\/think>|$)([^]*)$/);
    const thinks = open || close;
    const text = thinks ? rest : message.content;
    const speed = message.tokens && [
        `${message.tokens} ${words.tokens}`, `${message.seconds.toFixed(1)} s`,
        `${(message.tokens / message.seconds).toFixed(1)} ${words.tokens}/s`,
    ].join(" · ");
    return [
        message.dropped > 0 && made("p", "note", `${words.dropped} ${message.dropped}`),
        thinks && inner.trim() && thought(inner, close),
        message.metadata
            ? made("div", "call", icon("tool"), `${words.call} `, made("b", "", message.metadata),
                made("pre", "", made("code", "", text)), made("p", "note", words.call_hint))
            : prose(text),
        pending && !message.tokens && made("span", "waiting"),
        message.error && made("p", "error", message.error),
        made("small", "", [speed, message.stopped && words.stopped].filter(part => part).join(" · ")),
    ];
}

function assistant(message, index, last) {
    const sides = message.base
        ? [["adapter", message], ["base", message.base]].map(([side, message]) =>
            made("section", side, made("h3", "", words[side]), ...answered(message)))
        : [made("section", "", ...answered(message, message.pending))];
    const actions = made("nav", "", copyButton(message.content),
        last && button("retry", () => ask(index - 1, props.value[index - 1].content)),
        last && button("undo", () => trigger("undo")));
    return made("article", message.base ? "assistant compared" : "assistant", made("div", "sides", ...sides), actions);
}

function user(message, index) {
    const bubble = message.role === "user"
        ? prose(message.content)
        : made("div", "call", icon("tool"), words.result, made("pre", "", made("code", "", message.content)));
    const article = made("article", message.role, bubble);
    article.append(made("nav", "", button("edit", () => edit(article, message, index)), copyButton(message.content)));
    return article;
}

function edit(article, message, index) {
    const area = made("textarea", "");
    area.value = message.content;
    const send = made("button", "send", words.send), cancel = made("button", "", words.cancel);
    send.onclick = () => ask(index, area.value);
    cancel.onclick = () => article.replaceWith(user(message, index));
    article.replaceChildren(area, made("nav", "editing", cancel, send));
    area.style.height = `${area.scrollHeight + 2}px`;
    area.focus();
}

function ask(index, text) {
    if (text.trim()) trigger("ask", { index, text });
}

function welcome() {
    const examples = (props.examples ?? words.examples).map(text => {
        const button = made("button", "", text);
        button.onclick = () => ask(0, text);
        return button;
    });
    return made("div", "welcome", made("h2", "", words.welcome), made("div", "examples", ...examples));
}

let drawn = []; // what the articles were made of
function draw() {
    const messages = props.value;
    if (!Array.isArray(messages)) return; // what the browser has kept is still to come
    const follow = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    if (!messages.length) main.replaceChildren(welcome());
    else if (!drawn.length) main.replaceChildren();
    const wanted = messages.map((message, index) => JSON.stringify([message, index === messages.length - 1]));
    while (main.children.length > Math.max(messages.length, 1)) main.lastChild.remove();
    wanted.forEach((key, index) => {
        if (key === drawn[index]) return;
        const message = messages[index], last = index === messages.length - 1;
        const article = message.role === "assistant" ? assistant(message, index, last) : user(message, index);
        const before = main.children[index];
        article.querySelectorAll("details").forEach((part, place) => {
            part.open = before?.querySelectorAll("details")[place]?.open ?? false;
        });
        before ? before.replaceWith(article) : main.append(article);
    });
    drawn = wanted;
    main.classList.toggle("busy", Boolean(messages.at(-1)?.pending));
    if (follow) main.scrollTop = main.scrollHeight;
}

const { name, base, how } = props.about;
element.querySelector("header").append(made("h1", "", name),
    made("p", "", [base && `${words.adapter} · ${words.base} ${base}`, how].filter(part => part).join(" · ")));
watch("value", draw);
draw();
