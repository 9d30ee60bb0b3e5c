for (const line of document.querySelectorAll(".filter")) {
  const [box, said] = [line.querySelector("input"), line.querySelector("span")]
  const samples = [...line.closest("section").querySelectorAll(".sample")]
  line.hidden = false
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase()
    for (const sample of samples) sample.hidden = !sample.textContent.toLowerCase().includes(words)
    said.textContent = words && `${samples.filter((sample) => !sample.hidden).length} of ${samples.length}`
  })
}
