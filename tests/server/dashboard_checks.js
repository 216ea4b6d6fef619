// What may be wrong with a page to the eye. Each function gives a list of faults, empty for none.
({
  // Boxes that cover each other though neither contains the other; what scrolls sideways may.
  overlaps() {
    const kinds = "header > *, .card, .card > *, .tile > *, .axis > *, td, th, label, "
      + "button, input, select, textarea, footer";
    const boxes = [...document.querySelectorAll(kinds)]
      .filter((each) => each.checkVisibility() && !each.closest(".skip"))
      .map((each) => [each, each.getBoundingClientRect()])
      .filter(([, box]) => box.width > 0 && box.height > 0);
    const name = (each) => `${each.tagName} ${each.textContent.trim().slice(0, 30)}`;
    const found = [];
    for (const [a, one] of boxes) for (const [b, two] of boxes) {
      if (a === b || a.contains(b) || b.contains(a) || !(a.compareDocumentPosition(b) & 4)) continue;
      const x = Math.min(one.right, two.right) - Math.max(one.left, two.left);
      const y = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
      const scrolls = a.closest(".scroll") !== b.closest(".scroll");
      if (x > 1 && y > 1 && !scrolls) found.push(`${name(a)} / ${name(b)}`);
    }
    return found;
  },

  // What sticks out of the window to the right.
  outside() {
    return [...document.querySelectorAll("body *")]
      .filter((each) => each.checkVisibility() && !each.closest(".scroll") && !each.closest(".skip"))
      .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
      .map((each) => `${each.tagName} ${each.className}`);
  },

  // Text of less contrast than 4.5 to 1 (WCAG 2, level AA); what is disabled is exempt.
  contrasts() {
    const parts = (text) => text.match(/[\d.]+/g).map(Number);
    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) =>
      0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const ground = (each) => {
      for (; each; each = each.parentElement) {
        const back = parts(getComputedStyle(each).backgroundColor);
        if (back.length < 4 || back[3] > 0) return back;
      }
      return [255, 255, 255];
    };
    const weak = [];
    for (const each of document.querySelectorAll("body *")) {
      const says = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!says || !each.checkVisibility() || each.disabled || each.tagName === "OPTION") continue;
      const both = [light(parts(getComputedStyle(each).color)), light(ground(each))];
      const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
      if (ratio < 4.5) weak.push(`${ratio.toFixed(2)} ${each.tagName} ${each.textContent.slice(0, 30)}`);
    }
    return weak;
  },

  // Fields and buttons that a screen reader cannot name.
  nameless() {
    return [...document.querySelectorAll("input, select, textarea, button")]
      .filter((each) => !(each.labels && each.labels.length))
      .filter((each) => !(each.tagName === "BUTTON" && each.textContent.trim()))
      .map((each) => each.outerHTML);
  },
})
