"use strict";
// Line charts over optimizer steps, in the colours of the page, with the phases marked; drawn by Chart.js.
const charts = {
  // Colours that remain apart for people with any colour vision (Okabe and Ito).
  COLOURS: ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f", "#808080"],
  DASHES: [[], [6, 3], [2, 2], [8, 3, 2, 3]],

  colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  },

  // How the n-th of several lines looks.
  look(n) {
    return { borderColor: charts.COLOURS[n % 8], borderDash: charts.DASHES[Math.floor(n / 8) % 4] };
  },

  // A line where each phase begins, with its name on top.
  phases(phases) {
    return {
      id: "phases",
      afterDraw(chart) {
        const { ctx, chartArea: { left, right, top, bottom }, scales: { x } } = chart;
        ctx.save();
        ctx.font = "12px system-ui, sans-serif";
        ctx.fillStyle = charts.colour("quiet");
        ctx.strokeStyle = charts.colour("quiet");
        phases.forEach(([name, start], index) => {
          const at = x.getPixelForValue(start);
          if (at < left - 1 || at > right + 1) return;
          if (start > 0) {
            ctx.setLineDash([4, 4]);
            ctx.beginPath();
            ctx.moveTo(at, top);
            ctx.lineTo(at, bottom);
            ctx.stroke();
          }
          const late = at > (left + right) / 2;
          ctx.textAlign = late ? "right" : "left";
          ctx.fillText(name.length > 24 ? `${name.slice(0, 23)}\u2026` : name, at + (late ? -3 : 3), top - 4 - 13 * (index % 2));
        });
        ctx.restore();
      },
    };
  },

  // Draws lines into a canvas, in place of those that were there. A line: {label, points: [[step, value], …], and how it looks};
  // it is broken where a value is null.
  draw(canvas, lines, { phases, last, unit, low, high, legend = true, chosen = () => {} }) {
    Chart.getChart(canvas)?.destroy();
    const [ink, rule] = [charts.colour("ink"), charts.colour("line")];
    return new Chart(canvas, {
      type: "line",
      data: {
        datasets: lines.map(({ points, ...look }) => ({
          data: points.map(([x, y]) => ({ x, y })), borderWidth: 2, pointRadius: points.length > 40 ? 0 : 2, pointHitRadius: 8,
          backgroundColor: look.borderColor, clip: 5, ...look,
        })),
      },
      options: {
        animation: false,
        parsing: false,
        normalized: true,
        responsive: true,
        maintainAspectRatio: false,
        layout: { padding: { top: 30 } },
        interaction: { mode: "nearest", intersect: false },
        onClick: (event, found) => { if (found.length) chosen(found[0].datasetIndex, found[0].index); },
        scales: {
          x: {
            type: "linear", min: 0, max: Math.max(1, last), title: { display: true, text: "optimizer step", color: ink },
            ticks: { color: ink, maxRotation: 0 }, grid: { color: rule },
          },
          y: { min: low, max: high, title: { display: true, text: unit, color: ink }, ticks: { color: ink }, grid: { color: rule } },
        },
        plugins: { legend: { display: legend, position: "bottom", labels: { color: ink, boxHeight: 1, boxWidth: 30 } } },
      },
      plugins: [charts.phases(phases)],
    });
  },
};
