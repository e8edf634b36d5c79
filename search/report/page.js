"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const template = () => {
    const [ink, grid, card] = dark.matches ? ["#e4e8ee", "#343d4a", "#1a2029"] : ["#1c2430", "#e3e7ed", "#ffffff"];
    const axis = {gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, title: {standoff: 8}};
    return {layout: {
      font: {color: ink, size: 12, family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif"},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      hoverlabel: {bgcolor: card, bordercolor: grid, font: {color: ink}, align: "left"},
    }};
  };
  // A finger that moves over a figure scrolls the page.
  const config = {responsive: true, displayModeBar: false};
  const draw = () => {
    for (const place of document.querySelectorAll(".plot")) {
      const {data, layout} = JSON.parse(document.getElementById(place.dataset.figure).textContent);
      Plotly.react(place, data, {...layout, template: template(), ...(coarse ? {dragmode: false} : {})}, config);
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
