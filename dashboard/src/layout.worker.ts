// Where does each node stand? Layers from left to right, or from top to bottom, off the page's thread: it takes seconds for hundreds of nodes.
import { Graph, layout } from "@dagrejs/dagre";

export interface Asked {
  nodes: { id: string; width: number; height: number }[];
  edges: { source: string; target: string }[];
  flow: "right" | "down";
}
export interface Placed {
  nodes: Record<string, [number, number]>;
  // Where an edge that passes other columns goes through, so that it does not run behind their nodes.
  ways: Record<string, [number, number][]>;
  width: number;
  height: number;
}

onmessage = (event: MessageEvent<Asked>) => {
  const graph = new Graph({ multigraph: false });
  const isDown = event.data.flow === "down";
  graph.setGraph({ rankdir: isDown ? "TB" : "LR", nodesep: isDown ? 34 : 46, edgesep: 14, ranksep: isDown ? 84 : 88, marginx: 16, marginy: 30 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const { id, width, height } of event.data.nodes) graph.setNode(id, { width, height });
  for (const { source, target } of event.data.edges) if (source !== target) graph.setEdge(source, target);
  layout(graph);
  const nodes: Placed["nodes"] = {};
  for (const id of graph.nodes()) {
    const { x, y } = graph.node(id) as { x: number; y: number };
    nodes[id] = [x, y];
  }
  const ways: Placed["ways"] = {};
  for (const { v, w } of graph.edges()) {
    const points = (graph.edge(v, w) as { points: { x: number; y: number }[] }).points;
    if (points.length > 3) ways[`${v} ${w}`] = points.slice(1, -1).map(({ x, y }) => [x, y]);
  }
  const { width = 0, height = 0 } = graph.graph() as { width?: number; height?: number };
  postMessage({ nodes, ways, width, height } satisfies Placed);
};
