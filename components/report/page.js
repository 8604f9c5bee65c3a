"use strict";
document.documentElement.classList.add("scripted");

// Panels of which one is shown: the scores of the matrix, the models' curves.
for (const group of document.querySelectorAll("[data-shows]")) {
  const show = () => {
    const chosen = group.querySelector("input:checked").value;
    for (const panel of document.querySelectorAll(`[data-of="${group.dataset.shows}"]`)) {
      panel.hidden = panel.dataset.value !== chosen;
    }
  };
  group.addEventListener("change", show);
  show();
}

const data = document.getElementById("data");
if (data) startGallery(JSON.parse(data.textContent));

function startGallery(sets) {
  const at = (id) => document.getElementById(id);
  const [model, steps, order, heldout, large] = ["model", "steps", "order", "heldout", "large"].map(at);
  const [ways, slide, other, cut, gallery, count] = ["ways", "slide", "other", "cut", "gallery", "count"].map(at);
  let current = null;
  let way = "guided";

  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const picture = (images, key, kind) =>
    make("img", { className: kind, alt: "", decoding: "async", draggable: false,
                  src: "data:image/webp;base64," + images[key] });

  function chooseModel() {
    const before = steps.value;
    const known = sets.filter((one) => one.model === model.value).map((one) => String(one.steps));
    steps.replaceChildren(...known.map((value) => make("option", { value, textContent: value })));
    if (known.includes(before)) steps.value = before;
    chooseSet();
  }

  function chooseSet() {
    current = sets.find((one) => one.model === model.value && String(one.steps) === steps.value);
    const keys = Object.keys(current.ways);
    if (!keys.includes(way)) way = "guided";
    const radios = keys.map((key, number) => {
      const input = make("input", { type: "radio", name: "way", value: key, checked: key === way });
      const name = make("span", { textContent: current.ways[key] });
      name.prepend(make("kbd", { textContent: number + 1 }), " ");
      return make("label", {}, input, name);
    });
    ways.replaceChildren(ways.querySelector("legend"), ...radios);
    const before = other.value || "cfg";
    other.replaceChildren(...keys.map((value) => make("option", { value, textContent: current.ways[value] })));
    other.value = keys.includes(before) ? before : "cfg";
    fill();
  }

  function fill() {
    let shown = current.pictures.filter((one) => !heldout.checked || one.is_heldout);
    if (order.value === "worst") {
      shown = [...shown].sort((a, b) => a.psnr - b.psnr);
    }
    gallery.replaceChildren(...shown.map(card));
    gallery.classList.toggle("sliding", slide.checked);
    const which = current.pictures.length
      ? "the first ones, and those that are furthest from CFG."
      : "the page has room for pictures of fewer models and steps only.";
    count.textContent = `${shown.length} of ${current.total} images: ${which}`;
  }

  function card(one) {
    const button = make("button", { type: "button", className: "picture" });
    button.one = one;
    button.way = null; // as all others
    draw(button);
    button.addEventListener("click", () => {
      if (slide.checked) return;
      const own = button.way ?? way;
      const flipped = way === other.value ? "guided" : other.value;
      button.way = own === way ? flipped : null;
      draw(button);
    });
    const drag = (event) => {
      if (!slide.checked || (event.pointerType === "touch" && event.type === "pointerdown")) return;
      const box = button.getBoundingClientRect();
      setCut(Math.round(100 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))));
    };
    button.addEventListener("pointermove", drag);
    button.addEventListener("pointerdown", drag);
    const caption = make("figcaption", {}, make("b", { textContent: one.prompt }), make("br"));
    caption.append(`seed ${one.seed} · ${one.psnr.toFixed(1)} dB`);
    if (one.is_heldout) caption.append(" ", make("span", { className: "badge", textContent: "held out" }));
    return make("figure", {}, button, caption);
  }

  function draw(button) {
    const { one } = button;
    const shown = button.way ?? way;
    const label = (key) => (key in one.images ? current.ways[key] : `no ${current.ways[key]}`);
    const parts = [];
    if (slide.checked) {
      if (other.value in one.images) parts.push(picture(one.images, other.value, "under"));
      if (way in one.images) parts.push(picture(one.images, way, "over"));
      parts.push(make("span", { className: "edge" }));
    } else if (shown in one.images) {
      parts.push(picture(one.images, shown, "whole"));
    }
    const says = slide.checked ? `${label(other.value)} | ${label(way)}` : label(shown);
    if (button.way || slide.checked || !(shown in one.images)) {
      parts.push(make("span", { className: "way", textContent: says }));
    }
    button.classList.toggle("flipped", button.way !== null);
    button.setAttribute("aria-label", `${one.prompt}, seed ${one.seed}: ${says}`);
    button.replaceChildren(...parts);
  }

  function redraw() {
    gallery.classList.toggle("sliding", slide.checked);
    cut.disabled = !slide.checked;
    for (const button of gallery.querySelectorAll(".picture")) {
      button.way = null;
      draw(button);
    }
  }

  function setCut(value) {
    cut.value = value;
    gallery.style.setProperty("--cut", `${value}%`);
  }

  function setWay(key) {
    way = key;
    ways.querySelector(`input[value="${key}"]`).checked = true;
    redraw();
  }

  model.addEventListener("change", chooseModel);
  steps.addEventListener("change", chooseSet);
  order.addEventListener("change", fill);
  heldout.addEventListener("change", fill);
  large.addEventListener("change", () => gallery.classList.toggle("large", large.checked));
  ways.addEventListener("change", (event) => setWay(event.target.value));
  other.addEventListener("change", redraw);
  slide.addEventListener("change", redraw);
  cut.addEventListener("input", () => setCut(cut.value));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("select, input[type=range], input[type=radio]") && event.key.startsWith("Arrow")) return;
    const keys = Object.keys(current.ways);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (/^[1-9]$/.test(event.key) && event.key <= keys.length) setWay(keys[event.key - 1]);
    else if (step && !event.target.closest(".scroll")) {
      setWay(keys[(keys.indexOf(way) + step + keys.length) % keys.length]);
      event.preventDefault();
    } else if (event.key === "s" || event.key === "S") slide.click();
    else if (event.key === "h" || event.key === "H") heldout.click();
  });

  chooseModel();
}
