// On which line of an object's YAML does a field stand? For YAML as the control plane writes it: blocks, lists as deep as
// their key.

// field: `spec.http[0].route[1].destination.subset`. The line of as much of it as is there; -1 for nothing.
export function lineOf(yaml: string, field: string): number {
  const lines = yaml.split("\n");
  const depth = (line: string) => line.length - line.trimStart().length;
  let [from, to, indent, found] = [0, lines.length, 0, -1];
  for (const part of field.match(/[^.[\]]+/g) ?? []) {
    if (/^\d+$/.test(part)) {
      const first = lines.findIndex((line, index) => index >= from && index < to && line.trimStart().startsWith("- "));
      if (first < 0) return found;
      const at = depth(lines[first]!);
      const starts = lines.flatMap((line, index) => (index >= from && index < to && depth(line) === at && line.trimStart().startsWith("- ") ? [index] : []));
      const start = starts[Number(part)];
      if (start === undefined) return found;
      [from, to, indent, found] = [start, starts[Number(part) + 1] ?? to, at + 2, start];
      lines[start] = lines[start]!.replace("- ", "  ");
    } else {
      const wanted = `${" ".repeat(indent)}${part}:`;
      const start = lines.findIndex((line, index) => index >= from && index < to && line.startsWith(wanted));
      if (start < 0) return found;
      const isWithin = (line: string) => !line.trim() || depth(line) > indent || (depth(line) === indent && line.trimStart().startsWith("- "));
      let end = start + 1;
      while (end < to && isWithin(lines[end]!)) end++;
      const next = lines[start + 1] ?? "";
      [from, to, indent, found] = [start + 1, end, depth(next), start];
    }
  }
  return found;
}
