// Typeset what pymdownx.arithmatex marks as mathematics, with the copy of KaTeX that this site contains.
function typeset() {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const source = element.textContent.trim(); // \( inline \) or \[ display \]
    const displayMode = source.startsWith("\\[");
    katex.render(source.slice(2, -2), element, { displayMode, throwOnError: false });
  }
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", typeset);
else typeset();
