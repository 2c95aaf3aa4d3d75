// How has it been lately? A small chart of one node or edge over the last quarter of an hour, with the changes marked.
import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { get, type Point } from "./api";
import { changes, choices, now } from "./state";

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Without the date, for which there is no room and no need.
function minute(at: number): string {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

export function Chart({ query, title }: { query: Record<string, string>; title: string }) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const key = JSON.stringify(query);
  const slot = Math.floor(now.value / 5);
  const [isEmpty, setEmpty] = useState(false);
  useEffect(() => {
    if (!place.current) return;
    const end = () => choices.value.end || now.value;
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, size: 42 };
    const marks = (chart: uPlot) => {
      chart.ctx.save();
      chart.ctx.strokeStyle = colour("--accent");
      chart.ctx.setLineDash([3, 3]);
      for (const change of changes.value) {
        const x = chart.valToPos(change.at, "x", true);
        if (x < chart.bbox.left || x > chart.bbox.left + chart.bbox.width) continue;
        chart.ctx.beginPath();
        chart.ctx.moveTo(x, chart.bbox.top);
        chart.ctx.lineTo(x, chart.bbox.top + chart.bbox.height);
        chart.ctx.stroke();
      }
      chart.ctx.restore();
    };
    plot.current = new uPlot(
      {
        width: place.current.clientWidth || 320,
        height: 150,
        legend: { show: false },
        cursor: { y: false },
        axes: [{ ...axis, size: 28, values: (_, times) => times.map(minute) }, axis, { ...axis, side: 1, scale: "ms", grid: { show: false } }],
        scales: { x: { range: () => [end() - 900, end()] }, y: { range: (_, __, most) => [0, most || 1] }, ms: { range: (_, __, most) => [0, most || 1] } },
        series: [
          {},
          { label: "rps", stroke: colour("--healthy"), width: 2, fill: colour("--healthy-soft") },
          { label: "errors", stroke: colour("--failure"), width: 2 },
          { label: "p95", stroke: colour("--dim"), width: 1.5, dash: [4, 3], scale: "ms" },
        ],
        hooks: { draw: [marks] },
      },
      [[], [], [], []],
      place.current,
    );
    const resized = new ResizeObserver(([entry]) => plot.current?.setSize({ width: Math.max(200, entry!.contentRect.width), height: 150 }));
    resized.observe(place.current);
    return () => {
      resized.disconnect();
      plot.current?.destroy();
    };
  }, [key, choices.value.theme]);
  useEffect(() => {
    const end = choices.value.end || undefined;
    void get<{ points: Point[] }>("/v1/series", { ...query, seconds: 900, ...(end ? { end } : {}) }).then(({ points: found }) => {
      // The slot that is under way would look like a fall.
      const points = found.filter(({ at, seconds }) => at + seconds <= (end ?? now.value));
      setEmpty(!points.some(({ rates }) => rates.rps > 0));
      plot.current?.setData([
        points.map((point) => point.at),
        points.map((point) => point.rates.rps),
        points.map((point) => point.rates.rps * point.rates.errors),
        points.map((point) => point.rates.p95),
      ]);
    });
  }, [key, slot]);
  return (
    <figure class="chart">
      <figcaption>
        {title}: <span class="key rps">requests/s</span> <span class="key err">errors/s</span>{" "}
        <span class="key p95">p95 ms</span> <span class="key change">change</span>
        {isEmpty && " (no request yet)"}
      </figcaption>
      <div ref={place} role="img" aria-label={`${title} over the last 15 minutes`} />
    </figure>
  );
}
