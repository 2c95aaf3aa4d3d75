// How are numbers said? Short, with their unit, and never with more digits than they deserve.

export function rate(rps: number): string {
  if (!rps) return "0 rps";
  if (rps < 0.005) return "<0.01 rps";
  return rps >= 100 ? `${rps.toFixed(0)} rps` : rps >= 10 ? `${rps.toFixed(1)} rps` : `${rps.toFixed(2)} rps`;
}

export function share(of: number): string {
  const percent = of * 100;
  return percent > 0 && percent < 0.1 ? "<0.1 %" : `${percent.toFixed(percent < 10 && percent > 0 ? 1 : 0)} %`;
}

export function milliseconds(value: number | null): string {
  if (value === null) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function clock(at: number): string {
  return new Date(at * 1000).toLocaleTimeString();
}

export function shortName(id: string): string {
  return id.slice(id.indexOf(":") + 1);
}

export function span(seconds: number): string {
  if (seconds <= 0) return "no time: it has ended";
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : seconds < 172800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86400).toFixed(0)} d`;
}
