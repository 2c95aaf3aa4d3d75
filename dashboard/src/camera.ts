// Which part of the graph is seen, and how large? All of it, until the reader chooses: then what is in the middle stays
// there when the stage gets another size. Moves an SVG group by itself, so that nothing is drawn anew.
import { signal } from "@preact/signals";
import { choices, choose } from "./state";

export interface Camera {
  scale: number;
  // In the graph's own units: what is in the middle of the stage.
  x: number;
  y: number;
}
export interface Extent {
  width: number;
  height: number;
}

const LEAST = 0.05;
const MOST = 3;
const FIT_MOST = 1.25;
// Labels are shown at this height or more, as far as there is room for larger ones between the nodes.
const READABLE = 0.9;
const GROWTH = 1.2;
// From here on what is smaller than a node is not drawn: nobody could read it.
const FAR = 0.42;
const STEP = 60;
const MARGIN = 12;

function written({ scale, x, y }: Camera): string {
  return `${scale.toFixed(3)},${x.toFixed(0)},${y.toFixed(0)}`;
}

function read(text: string): Camera | null {
  const [scale, x, y] = text.split(",").map(Number);
  return scale && Number.isFinite(scale) && Number.isFinite(x) && Number.isFinite(y) ? { scale: within(scale, LEAST, MOST), x: x!, y: y! } : null;
}

function within(value: number, least: number, most: number): number {
  return Math.min(most, Math.max(least, value));
}

export class Stage {
  // What is chosen in the midst of a movement; the URL is told once it is over, since browsers bound how often it changes.
  private moving: Camera | null = null;
  private timer = 0;
  private whole: Extent = { width: 1, height: 1 };
  readonly isFitted = signal(true);

  constructor(
    readonly svg: SVGSVGElement,
    private readonly group: SVGGElement,
  ) {}

  get size(): [number, number] {
    return [this.svg.clientWidth || 1, this.svg.clientHeight || 1];
  }

  get camera(): Camera {
    return this.moving ?? read(choices.value.camera) ?? this.fitted();
  }

  private fitted(): Camera {
    const [width, height] = this.size;
    const scale = Math.min((width - MARGIN) / this.whole.width, (height - MARGIN) / this.whole.height, FIT_MOST);
    return { scale: Math.max(LEAST, scale), x: this.whole.width / 2, y: this.whole.height / 2 };
  }

  // The graph, the stage or the URL has changed.
  show(whole: Extent = this.whole): void {
    this.whole = whole;
    const { scale, x, y } = this.camera;
    const [width, height] = this.size;
    this.group.setAttribute("transform", `translate(${width / 2 - x * scale} ${height / 2 - y * scale}) scale(${scale})`);
    this.svg.style.setProperty("--grow", String(within(READABLE / scale, 1, GROWTH)));
    this.svg.classList.toggle("far", scale < FAR);
    this.svg.dataset["scale"] = scale.toFixed(3);
    this.isFitted.value = !this.moving && !choices.value.camera;
  }

  move(to: Camera): void {
    this.moving = { scale: within(to.scale, LEAST, MOST), x: within(to.x, 0, this.whole.width), y: within(to.y, 0, this.whole.height) };
    this.show();
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => {
      const kept = this.moving;
      this.moving = null;
      if (kept) choose({ camera: written(kept) });
    }, 200);
  }

  fit(): void {
    clearTimeout(this.timer);
    this.moving = null;
    choose({ camera: "" });
    this.show();
  }

  // at: a point of the stage, which stays where it is; the middle if none is given.
  zoom(factor: number, at?: [number, number]): void {
    const { scale, x, y } = this.camera;
    const next = within(scale * factor, LEAST, MOST);
    const [width, height] = this.size;
    const [right, down] = at ? [at[0] - width / 2, at[1] - height / 2] : [0, 0];
    this.move({ scale: next, x: x + right / scale - right / next, y: y + down / scale - down / next });
  }

  pan(right: number, down: number): void {
    const { scale, x, y } = this.camera;
    this.move({ scale, x: x + right / scale, y: y + down / scale });
  }

  // What is focused or chosen must be seen. Nothing moves if it is.
  reveal(element: Element): void {
    const stage = this.svg.getBoundingClientRect();
    const box = element.getBoundingClientRect();
    const isIn = box.left >= stage.left && box.right <= stage.right && box.top >= stage.top && box.bottom <= stage.bottom;
    const isWider = box.width > stage.width || box.height > stage.height;
    if (isIn || isWider) return;
    this.pan((box.left + box.right) / 2 - (stage.left + stage.right) / 2, (box.top + box.bottom) / 2 - (stage.top + stage.bottom) / 2);
  }

  // Whether the key was for the graph.
  press(event: KeyboardEvent): boolean {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    switch (event.key) {
      case "+":
      case "=":
        this.zoom(1.25);
        return true;
      case "-":
        this.zoom(0.8);
        return true;
      case "0":
        this.fit();
        return true;
      case "ArrowLeft":
        this.pan(-STEP, 0);
        return true;
      case "ArrowRight":
        this.pan(STEP, 0);
        return true;
      case "ArrowUp":
        this.pan(0, -STEP);
        return true;
      case "ArrowDown":
        this.pan(0, STEP);
        return true;
      default:
        return false;
    }
  }

  // Mouse, pen and finger, until what is returned is called.
  listen(): () => void {
    const { svg } = this;
    let held: { x: number; y: number; isDrag: boolean } | null = null;
    const wheel = (event: WheelEvent) => {
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(event.deltaX || event.deltaY, 0);
      else this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), [event.clientX - box.left, event.clientY - box.top]);
    };
    const down = (event: PointerEvent) => {
      if (event.button === 0) held = { x: event.clientX, y: event.clientY, isDrag: false };
    };
    const move = (event: PointerEvent) => {
      if (!held) return;
      const [right, below] = [held.x - event.clientX, held.y - event.clientY];
      if (!held.isDrag && Math.hypot(right, below) < 5) return;
      if (!held.isDrag) svg.setPointerCapture(event.pointerId);
      held = { x: event.clientX, y: event.clientY, isDrag: true };
      svg.classList.add("held");
      this.pan(right, below);
    };
    const up = () => {
      // The click that ends a drag is none.
      if (held?.isDrag) svg.addEventListener("click", (event) => event.stopPropagation(), { capture: true, once: true });
      if (held?.isDrag) setTimeout(() => svg.classList.remove("held"), 0);
      held = null;
    };
    svg.addEventListener("wheel", wheel, { passive: false });
    svg.addEventListener("pointerdown", down);
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerup", up);
    svg.addEventListener("pointercancel", up);
    const watched = new ResizeObserver(() => this.show());
    watched.observe(svg);
    return () => {
      watched.disconnect();
      svg.removeEventListener("wheel", wheel);
      svg.removeEventListener("pointerdown", down);
      svg.removeEventListener("pointermove", move);
      svg.removeEventListener("pointerup", up);
      svg.removeEventListener("pointercancel", up);
    };
  }
}
