// Runs in a page that holds the report in frames of several widths; what it finds goes into #seen.
function rgb(text) { return text.match(/[\d.]+/g).map(Number); }
function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function contrast(a, b) {
  const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (high + .05) / (low + .05);
}
function behind(element, view) {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgb(view.getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, found = [], width = page.documentElement.clientWidth;
  const name = element => element.tagName + "." + element.getAttribute("class") + " " + element.textContent.trim().slice(0, 40);
  if (page.documentElement.scrollWidth > width) found.push("scrolls sideways: " + page.documentElement.scrollWidth);
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = view.getComputedStyle(element), box = element.getBoundingClientRect();
    const range = page.createRange();
    range.selectNodeContents(element);
    const text = range.getBoundingClientRect();
    if (text.left < -.5 || text.right > width + .5) found.push("leaves the page: " + name(element));
    const card = element.closest("section, .tile");
    if (card && text.right > card.getBoundingClientRect().right + .5) found.push("leaves its card: " + name(element));
    if (parseFloat(style.fontSize) < 11) found.push("small: " + style.fontSize + " " + name(element));
    const ratio = contrast(rgb(style.color), behind(element, view));
    if (ratio < 4.5) found.push("faint: " + ratio.toFixed(2) + " " + name(element));
  }
  const ends = [...page.querySelectorAll(".across, .ends")];
  for (const axis of ends) {
    const labels = [...axis.children].filter(e => e.textContent).map(e => e.getBoundingClientRect());
    for (let i = 1; i < labels.length; i++)
      if (labels[i].left < labels[i - 1].right - .5) found.push("labels overlap: " + name(axis));
  }
  return {found, width, background: view.getComputedStyle(page.body).backgroundColor,
          drawn: [...page.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height > 20).length};
}
onload = () => {
  document.getElementById("seen").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
