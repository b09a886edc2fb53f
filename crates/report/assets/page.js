// Draws the data that stands in this file. Everything from the data goes in as text, never as markup.
'use strict';
(() => {
  const view = JSON.parse(document.getElementById('data').textContent);
  const byId = (id) => document.getElementById(id);
  const compared = view.sides.length === 2;

  // ---- elements -------------------------------------------------------------------------------------------------
  const fillIn = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
      else if (name === 'style') element.style.cssText = value;
      else element.setAttribute(name, value === true ? '' : value);
    }
    element.append(...children.flat(3).filter((child) => child !== undefined && child !== null && child !== false));
    return element;
  };
  const h = (tag, attributes = {}, ...children) => fillIn(document.createElement(tag), attributes, children);
  const s = (tag, attributes = {}, ...children) =>
    fillIn(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
  // `names` between backquotes are set as code.
  const coded = (text) => text.split('`').map((part, i) => (i % 2 ? h('code', {}, part) : part));

  // ---- numbers --------------------------------------------------------------------------------------------------
  const grouped = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ',');
  const short = (v, digits = 4) => {
    if (v === null || v === undefined) return '–';
    if (v === 0) return '0';
    const size = Math.abs(v);
    const text = size >= 1e6 || size < 1e-3 ? v.toExponential(digits - 1) : String(Number(v.toPrecision(digits)));
    return text.replace(/\.?0+e/, 'e').replace('e+', 'e').replace('-', '\u2212');
  };
  const share = (part, whole) => (whole ? `${short((100 * part) / whole, 3)}%` : '–');
  const bad = (side) => side.total - side.finite;
  const isNan = (cell) => cell.sides.some((side) => bad(side) > 0);

  // ---- what colours a cell --------------------------------------------------------------------------------------
  const log10 = (v) => Math.log10(Math.max(v, 1e-300));
  const span = (v, low, high) => Math.min(1, Math.max(0, (v - low) / (high - low)));
  const finiteCells = () => view.runs.flatMap((run) => run.steps.flatMap((step) => step.cells)).filter((cell) => !isNan(cell));
  const measured = (of) => {
    const found = finiteCells().map(of).filter((v) => v > 0).map(log10);
    const [low, high] = [Math.min(...found), Math.max(...found)];
    return found.length ? [low, Math.max(high, low + 1)] : [0, 1];
  };
  const power = (exponent) => (exponent < -3 || exponent > 4 ? `1e${exponent}` : String(10 ** exponent));
  const metric = (name, unit, of, low, high, label) => ({ name, unit, of, scale: (v) => (v > 0 ? span(log10(v), low, high) : 0), label: label || [power(Math.round(low)), power(Math.round(high))] });
  const ofOneSide = (name, of) => metric(name, '', of, ...measured(of));
  const metrics = compared
    ? [
        { name: 'ULP', unit: 'most ULPs', of: (c) => c.apart?.max_ulps, scale: (v) => span(Math.log2(v + 1), 0, 32), label: ['1', '2\u00b3\u00b2'] },
        metric('NMSE', 'squared error / squares', (c) => c.apart?.nmse, -14, 0),
        metric('1 − cosine', '', (c) => (c.apart?.cosine === null || c.apart === null ? null : Math.max(0, 1 - c.apart.cosine)), -14, 0),
        metric('share that differs', '', (c) => (c.apart ? c.apart.differing / Math.max(1, c.sides[0].total) : null), -6, 0),
      ].concat(finiteCells().some((c) => c.bound) ? [metric('error / allowed', '', (c) => (c.bound ? c.bound.error / c.bound.limit : null), -3, 3)] : [])
    : [
        ofOneSide('rms', (c) => c.sides[0]?.rms),
        ofOneSide('largest magnitude', (c) => Math.max(...['finite_max', 'finite_min'].map((which) => Math.abs(Number.parseFloat(c.sides[0]?.[which]?.value ?? 0))))),
      ];
  // Bounds are the measure wherever a side is held to them.
  const chosen = ['error / allowed', 'NMSE'].map((name) => metrics.findIndex((m) => m.name === name)).find((i) => i >= 0);
  const state = { run: 0, step: 0, metric: chosen ?? 0, cell: 0 };

  const mix = (a, b, t) => `color-mix(in oklab, var(--${b}) ${(100 * t).toFixed(1)}%, var(--${a}))`;
  const warm = (t) => (t < 0.5 ? mix('warm-0', 'warm-1', 2 * t) : mix('warm-1', 'warm-2', 2 * t - 1));
  const fill = (cell) => {
    const { of, scale } = metrics[state.metric];
    const value = of(cell);
    const t = value === null || value === undefined ? 0 : scale(value);
    if (!compared) return mix('cool-0', 'cool-1', t);
    if (cell.status === 'match') return cell.apart.differing === 0 ? 'var(--equal)' : mix('equal', 'near', Math.sqrt(t));
    return warm(value === null || value === undefined ? 1 : t);
  };
  const statusText = { match: 'match', diverge: 'diverge', nan_left: 'NaN left', nan_right: 'NaN right', nan_both: 'NaN both', missing: 'missing' };
  const word = (cell) => (cell.status ? statusText[cell.status] : isNan(cell) ? 'not finite' : 'finite');
  const kind = (cell) => (isNan(cell) ? 'nan' : cell.status === 'missing' ? 'missing' : cell.status || 'match');
  const glyph = (cell) => (isNan(cell) ? { nan_left: 'L', nan_right: 'R', nan_both: 'B' }[cell.status] || 'N' : '');
  const place = (cell) => `${cell.layer === null ? '' : `layer ${cell.layer} · `}${cell.stage} · ${cell.buffer}`;
  const key = (cell) => `${cell.layer === null ? '' : `blk.${cell.layer}.`}${cell.stage}.${cell.buffer}`;
  const describe = (cell) => {
    const { name, of } = metrics[state.metric];
    const value = of(cell);
    const equal = cell.status === 'match' && cell.apart.differing === 0;
    const figure = equal ? ', all bits equal' : value === null || value === undefined || isNan(cell) ? '' : `, ${name} ${short(value)}`;
    return `${place(cell)}: ${word(cell)}${figure}`;
  };

  // ---- types ----------------------------------------------------------------------------------------------------
  // More bits are darker, so that types can be told apart without colour vision.
  const types = { Q2_K: ['2', '#5fae8d'], Q3_K: ['3', '#3f9d92'], Q4_K: ['4', '#4a94d0'], Q4_0: ['q', '#4a94d0'], Q4_1: ['r', '#3f83bb'], Q5_K: ['5', '#8b6fc9'],
    Q5_0: ['s', '#8b6fc9'], Q5_1: ['t', '#7b5fb8'], Q6_K: ['6', '#d9702a'], Q8_0: ['8', '#b03d0c'], F16: ['H', '#64748b'], BF16: ['B', '#64748b'], F32: ['F', '#475569'] };
  const typed = (name) => types[name] || [name[0], '#475569'];
  const kinds = view.types.kinds.filter((row) => row.layers.some((type) => type && type !== 'F32'));

  // ---- the grid -------------------------------------------------------------------------------------------------
  const columnOf = new Map(view.columns.map((column, i) => [`${column.stage}.${column.buffer}`, i]));
  const here = () => view.runs[state.run].steps[state.step];
  const isFirst = (index) => {
    const first = view.runs[state.run].first;
    return first !== null && first[0] === state.step && first[1] === index;
  };
  let buttons = [];

  const button = (cell, index, extra = '') => {
    const label = describe(cell) + (isFirst(index) ? ' (the first)' : '');
    const element = h('button', { class: `c ${kind(cell)} ${isFirst(index) ? 'first' : ''} ${extra}`, role: 'gridcell', type: 'button', tabindex: '-1',
      'aria-label': label, 'aria-selected': 'false', title: label, 'data-cell': key(cell), onclick: () => choose(index, true) }, extra ? h('span', {}, `${cell.stage} · ${cell.buffer}${isNan(cell) ? ' · NaN' : ''}`) : glyph(cell));
    if (!isNan(cell) && cell.status !== 'missing') element.style.setProperty('--fill', fill(cell));
    buttons[index] = element;
    return element;
  };

  const starts = (i) => i === 0 || view.columns[i].stage !== view.columns[i - 1].stage;
  const drawGrid = () => {
    const grid = byId('grid');
    const [columns, step] = [view.columns, here()];
    buttons = [];
    grid.style.setProperty('--high', `${Math.max(14, Math.min(26, Math.floor(720 / Math.max(1, view.layers)) - 1))}px`);
    grid.style.gridTemplateColumns = `auto repeat(${columns.length}, auto) ${kinds.length ? `26px repeat(${kinds.length}, 18px)` : ''}`;
    const at = (row, column, wide = 1) => `grid-row:${row};grid-column:${column} / span ${wide}`;
    const out = [];
    columns.forEach((column, i) => {
      if (starts(i)) {
        let wide = 1;
        while (columns[i + wide] && !starts(i + wide)) wide += 1;
        out.push(h('div', { class: 'stage', style: `${at(1, i + 2, wide)};margin-left:6px`, 'data-stage': column.stage }, h('span', {}, column.stage)));
      }
      const title = `${column.about}${column.aliases.length ? `\nelsewhere: ${column.aliases.join(', ')}` : ''}`;
      out.push(h('div', { class: 'buffer', style: `${at(2, i + 2)}${starts(i) ? ';margin-left:5px' : ''}`, title, 'data-column': i }, column.buffer));
    });
    const right = columns.length + 3;
    if (kinds.length) out.push(h('div', { class: 'kinds', style: at(1, right, kinds.length) }, h('span', {}, 'types')));
    kinds.forEach((row, i) => out.push(h('div', { class: 'kind', style: at(2, right + i), 'data-kind': row.kind }, row.kind)));

    const rows = new Map();
    step.cells.forEach((cell, index) => {
      const row = cell.layer === null ? cell.stage : cell.layer;
      rows.set(row, [...(rows.get(row) || []), [cell, index]]);
    });
    const wideRow = (name, line) => rows.has(name) && h('div', { role: 'row' }, rows.get(name).map(([cell, index]) => {
      const element = button(cell, index, 'wide');
      element.style.gridRow = line;
      element.style.gridColumn = `2 / span ${columns.length}`;
      return element;
    }));
    out.push(wideRow('embed', 3));
    for (let layer = 0; layer < view.layers; layer += 1) {
      const line = layer + 4;
      const cells = rows.get(layer) || [];
      const first = cells.some(([, index]) => isFirst(index));
      out.push(h('div', { role: 'row' },
        h('div', { class: `layer ${first ? 'first' : ''}`, style: at(line, 1), role: 'rowheader' }, String(layer)),
        cells.map(([cell, index]) => {
          const column = columnOf.get(`${cell.stage}.${cell.buffer}`);
          const element = button(cell, index);
          if (starts(column)) element.classList.add('start');
          element.style.gridRow = line;
          element.style.gridColumn = column + 2;
          return element;
        })));
      kinds.forEach((row, i) => {
        const type = row.layers[layer];
        const [letter, colour] = type ? typed(type) : ['', ''];
        out.push(h('div', { class: `t ${type ? '' : 'none'}`, style: `${at(line, right + i)};--fill:${colour}`, title: type ? `blk.${layer}.${row.kind}: ${type}` : '', 'data-type': `${layer}.${row.kind}` }, letter));
      });
    }
    out.push(wideRow('head', view.layers + 4));
    grid.replaceChildren(...out.filter(Boolean));
    drawLegend();
  };

  const drawLegend = () => {
    const { name, unit, label } = metrics[state.metric];
    const box = (colour, text, letter = '') => h('span', {}, h('span', { class: 'box', style: `background:${colour}` }, letter), text);
    const ramp = (stops) => h('span', { class: 'ramp', style: `background:linear-gradient(to right, ${stops})` });
    const used = [...new Set(kinds.flatMap((row) => row.layers.filter(Boolean)))].sort();
    const statuses = new Set(here().cells.map(kind));
    byId('legend').replaceChildren(...[
      compared && box('var(--equal)', 'equal bits'),
      compared && view.runs.some((run) => run.steps.some((step) => step.cells.some((c) => c.status === 'match' && c.apart.differing))) && box('var(--near)', 'within the bound'),
      h('span', { title: unit }, `${name} ${label[0]}`, ramp(compared ? 'var(--warm-0), var(--warm-1), var(--warm-2)' : 'var(--cool-0), var(--cool-1)'), label[1]),
      statuses.has('nan') && box('var(--nan)', compared ? 'NaN or infinity: left, right, both' : 'NaN or infinity', compared ? 'R' : 'N'),
      statuses.has('missing') && h('span', {}, h('span', { class: 'box', style: 'border:1px dashed var(--dim)' }), 'missing on a side'),
      view.runs[state.run].first && h('span', {}, h('span', { class: 'box', style: 'box-shadow:0 0 0 2px var(--ink)' }), 'the first'),
      ...used.map((type) => box(typed(type)[1], type, h('span', { style: 'color:#fff' }, typed(type)[0]))),
    ].filter(Boolean));
  };

  const drawTools = () => {
    const pick = (name, options, current, change) => options.length > 1 && h('label', {}, name, h('select', { 'aria-label': name, onchange: (event) => change(Number(event.target.value)) },
      options.map((text, i) => h('option', { value: i, selected: i === current }, text))));
    const stepName = (step, i) => `${i}: ${step.tokens.length} token${step.tokens.length === 1 ? '' : 's'} from position ${step.positions[0]}`;
    const run = view.runs[state.run];
    byId('tools').replaceChildren(...[
      pick('run', view.runs.map((r) => r.name), state.run, (i) => { state.run = i; toFirst(); }),
      pick('step', run.steps.map(stepName), state.step, (i) => { state.step = i; state.cell = run.first?.[0] === i ? run.first[1] : 0; draw(); }),
      pick('colour by', metrics.map((m) => m.name), state.metric, (i) => { state.metric = i; draw(); }),
      run.first && h('button', { class: 'plain', type: 'button', onclick: () => { toFirst(); buttons[state.cell]?.focus(); } }, compared ? 'First divergence' : 'First that is not finite'),
    ].filter(Boolean));
    byId('about').textContent = run.about;
  };

  // ---- choosing -------------------------------------------------------------------------------------------------
  const choose = (index, focus) => {
    const old = buttons[state.cell];
    if (old) { old.setAttribute('aria-selected', 'false'); old.tabIndex = -1; }
    state.cell = index;
    const [cell, now] = [here().cells[index], buttons[index]];
    now.setAttribute('aria-selected', 'true');
    now.tabIndex = 0;
    if (focus) now.focus({ preventScroll: true });
    const column = view.columns[columnOf.get(`${cell.stage}.${cell.buffer}`)] || view.outside.find((c) => c.stage === cell.stage);
    document.querySelectorAll('#grid .on, #grid .lit').forEach((element) => element.classList.remove('on', 'lit'));
    byId('grid').querySelector(`[data-column="${columnOf.get(`${cell.stage}.${cell.buffer}`)}"]`)?.classList.add('on');
    for (const weight of cell.layer === null ? [] : column.weights) {
      byId('grid').querySelector(`[data-type="${cell.layer}.${weight}"]`)?.classList.add('lit');
      byId('grid').querySelector(`[data-kind="${weight}"]`)?.classList.add('on');
    }
    drawCell(cell, index, column);
    drawRouting(cell);
    // A link to this cell. Where a page may not change its address, there is none.
    try { history.replaceState(null, '', `#${key(cell)}`); } catch { /* nothing is lost */ }
  };

  const toFirst = () => {
    const first = view.runs[state.run].first;
    [state.step, state.cell] = first || [0, 0];
    draw();
  };

  const neighbour = (cell, name) => {
    const cells = here().cells;
    const rows = ['embed', ...Array.from({ length: view.layers }, (_, i) => i), 'head'];
    const rowOf = (c) => rows.indexOf(c.layer === null ? c.stage : c.layer);
    const columnAt = (c) => (c.layer === null ? 0 : columnOf.get(`${c.stage}.${c.buffer}`));
    const inRow = (row) => cells.map((c, i) => [c, i]).filter(([c]) => rowOf(c) === row);
    const [row, column] = [rowOf(cell), columnAt(cell)];
    if (name === 'ArrowLeft' || name === 'ArrowRight') {
      const way = name === 'ArrowRight' ? 1 : -1;
      const beside = inRow(row).map(([c, i]) => [way * (columnAt(c) - column), i]).filter(([d]) => d > 0).sort((a, b) => a[0] - b[0]);
      return beside[0]?.[1];
    }
    if (name === 'Home') return inRow(row)[0][1];
    if (name === 'End') return inRow(row).at(-1)[1];
    const [way, far] = { ArrowUp: [-1, 1], ArrowDown: [1, 1], PageUp: [-1, 8], PageDown: [1, 8] }[name];
    let [found, steps] = [undefined, 0];
    for (let r = row + way; r >= 0 && r < rows.length && steps < far; r += way) {
      const near = inRow(r).map(([c, i]) => [Math.abs(columnAt(c) - (state.column ?? column)), i]).sort((a, b) => a[0] - b[0])[0];
      if (near) [found, steps] = [near[1], steps + 1];
    }
    return found;
  };
  byId('grid').addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'f' || event.key === 'F') { toFirst(); buttons[state.cell]?.focus(); event.preventDefault(); return; }
    if (!['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', 'Home', 'End', 'PageUp', 'PageDown'].includes(event.key)) return;
    event.preventDefault();
    const cell = here().cells[state.cell];
    // Through a row of one cell and out again, the column is kept.
    const vertical = ['ArrowUp', 'ArrowDown', 'PageUp', 'PageDown'].includes(event.key);
    if (!vertical) state.column = undefined;
    else if (cell.layer !== null) state.column = columnOf.get(`${cell.stage}.${cell.buffer}`);
    const next = neighbour(cell, event.key);
    if (next !== undefined) choose(next, true);
  });

  // ---- one cell -------------------------------------------------------------------------------------------------
  const sideNames = compared ? ['left', 'right'] : ['values'];
  const statistics = (cell) => {
    const [l, r] = cell.sides;
    const row = (name, of, warn = () => false) => h('tr', {}, h('th', { scope: 'row' }, name), cell.sides.map((side) => h('td', { class: warn(side) ? 'bad' : '' }, of(side))));
    const firstAt = (n, at) => (n ? `${grouped(n)}${at === null ? '' : ` (first at ${at})`}` : '0');
    const number = (n) => (n === null ? '–' : n.value.replace('-', '\u2212'));
    return h('table', {},
      h('thead', {}, h('tr', {}, h('th'), cell.sides.map((_, i) => h('th', { scope: 'col' }, compared && h('span', { class: 'swatch', style: `background:var(--${sideNames[i]});margin-right:6px` }), compared ? view.sides[i].name : sideNames[i])))),
      h('tbody', {},
        row('total', (x) => grouped(x.total)),
        row('finite', (x) => grouped(x.finite), (x) => bad(x) > 0),
        row('NaN', (x) => firstAt(x.nan, x.nan_first), (x) => x.nan > 0),
        row('Inf', (x) => firstAt(x.inf, x.inf_first), (x) => x.inf > 0),
        row('min', (x) => number(x.finite_min)),
        row('max', (x) => number(x.finite_max)),
        (l.mean ?? r?.mean) !== null && row('mean', (x) => short(x.mean, 6)),
        (l.rms ?? r?.rms) !== null && row('rms', (x) => short(x.rms, 6))));
  };
  const distances = (cell) => {
    const a = cell.apart;
    const rows = [['bits', a.differing ? `${grouped(a.differing)} of ${grouped(cell.sides[0].total)} differ (${share(a.differing, cell.sides[0].total)})` : 'all equal', a.differing > 0 && cell.status !== 'match']];
    const exact = (n) => `${n.value} (${n.bits})`;
    if (a.first) rows.push(['first', `at ${a.first.index}: ${exact(a.first.left)} and ${exact(a.first.right)}`]);
    if (a.differing) rows.push(
      ['max ULP', a.max_ulps === null ? '–' : grouped(a.max_ulps)], ['max abs', short(a.max_abs)],
      ['cosine', a.cosine === null ? 'undefined' : a.cosine.toFixed(12)], ['NMSE', a.nmse === null ? 'undefined' : short(a.nmse)]);
    if (cell.bound) rows.push(['error', `${cell.bound.error === null ? 'not a number' : short(cell.bound.error)}, ${short(cell.bound.limit)} allowed`, cell.bound.error === null || cell.bound.error > cell.bound.limit]);
    for (const tie of cell.near_ties.slice(0, 8)) rows.push(['near tie', `row ${tie.row}: experts ${tie.left} and ${tie.right}, ${short(tie.margin)} apart; ${short(tie.limit)} is within the error`]);
    return h('table', {}, h('tbody', {}, rows.map(([name, text, off]) => h('tr', {}, h('th', { scope: 'row' }, name), h('td', { class: off ? 'off' : '' }, text)))));
  };

  const [W, H, B] = [460, 96, 16]; // of a plot: width, height above the axis, labels below
  const histogram = (spread) => {
    const sides = [spread.left, spread.right].filter(Boolean);
    const bins = Math.max(...sides.map((side) => side.bins.length));
    if (!bins) return null;
    const most = Math.max(1, ...sides.flatMap((side) => side.bins));
    const x = (t) => (W * (t - spread.low)) / (spread.high - spread.low);
    // The square root, so that a few values far out are seen.
    const y = (n) => H - H * Math.sqrt(n / most);
    const outline = (side) => `M0 ${H}${side.bins.map((n, i) => `V${y(n).toFixed(1)}H${((W * (i + 1)) / bins).toFixed(1)}`).join('')}V${H}`;
    const value = (t) => short(spread.scale * Math.sinh(t), 2);
    const ticks = [spread.low, 0, spread.high].filter((t, i) => i !== 1 || (x(0) > 70 && x(0) < W - 70));
    return h('figure', { 'data-plot': 'values' },
      h('figcaption', {}, h('b', {}, 'Values'), h('span', {}, sides.map((_, i) => compared && h('span', {}, h('span', { class: 'swatch', style: `background:var(--${sideNames[i]});margin:0 5px 0 0` }), i === 0 && !spread.right ? 'both, equal' : sideNames[i])), h('span', {}, 'axis linear near 0, then logarithmic'))),
      s('svg', { class: 'plot', viewBox: `0 0 ${W} ${H + B}`, role: 'img', 'aria-label': 'histogram of the values' },
        s('path', { class: 'left', d: outline(spread.left) }),
        spread.right && s('path', { class: 'right', d: outline(spread.right) }),
        s('path', { class: 'axis', d: `M0 ${H}H${W}${ticks[1] === 0 ? `M${x(0)} ${H}v4` : ''}` }),
        ticks.map((t, i) => s('text', { x: x(t), y: H + 13, 'text-anchor': i === 0 ? 'start' : i === ticks.length - 1 ? 'end' : 'middle' }, value(t)))));
  };
  const ulpPlot = (spread) => {
    if (!spread.right || !spread.ulps.length) return null;
    const most = Math.max(...spread.ulps);
    const wide = W / 34;
    const y = (n) => (n ? (H * Math.log(n + 1)) / Math.log(most + 1) : 0);
    const name = (i) => (i === 0 ? 'equal bits' : i === 1 ? '1 ULP' : `${grouped(2 ** (i - 1))} to ${grouped(2 ** i - 1)} ULPs`);
    return h('figure', { 'data-plot': 'ulps' },
      h('figcaption', {}, h('b', {}, 'Distance of the two'), h('span', {}, 'values by ULPs, both axes logarithmic')),
      s('svg', { class: 'plot', viewBox: `0 0 ${W} ${H + B}`, role: 'img', 'aria-label': 'histogram of distances in ULPs' },
        spread.ulps.map((n, i) => s('rect', { class: i ? 'bar' : 'bar zero', x: i * wide + 1, width: wide - 2, y: H - y(n), height: y(n), rx: 1.5 }, s('title', {}, `${name(i)}: ${grouped(n)}`))),
        s('path', { class: 'axis', d: `M0 ${H}H${W}` }),
        [[0, '='], [1, '1'], [9, '2⁸'], [17, '2¹⁶'], [25, '2²⁴'], [33, '2³²']].map(([i, text]) => s('text', { x: (i + 0.5) * wide, y: H + 13, 'text-anchor': 'middle' }, text))));
  };

  const drawCell = (cell, index, column) => {
    const types = (column?.weights || []).map((weight) => {
      const row = view.types.kinds.find((of) => of.kind === weight);
      const type = cell.layer === null ? view.types.outside.find(([name]) => name === weight)?.[1] : row?.layers[cell.layer];
      return type && `${weight} ${type}`;
    }).filter(Boolean);
    const alias = (name) => (cell.layer === null ? name : `${name}-${cell.layer}`);
    byId('cell').replaceChildren(...[
      h('h2', {}, 'Cell'),
      h('div', { class: 'where' }, h('span', {}, place(cell)), h('span', { class: `pill ${kind(cell)}` }, word(cell)), isFirst(index) && h('span', { class: 'pill mark' }, 'the first')),
      h('p', { class: 'note' }, column?.about, column?.aliases.length ? [' · elsewhere ', column.aliases.map((name, i) => [i ? ', ' : '', h('code', {}, alias(name))])] : '', types.length ? ` · reads ${types.join(', ')}` : ''),
      ...(cell.sides.length
        ? [cell.apart && h('h3', {}, 'Left against right'), cell.apart && distances(cell), cell.spread && histogram(cell.spread), cell.spread && ulpPlot(cell.spread), h('h3', {}, 'Statistics'), statistics(cell)]
        : [h('p', {}, cell.status === 'missing' ? 'One side does not have this buffer: nothing was compared here.' : 'No statistics were kept.')]),
    ].filter(Boolean));
  };

  // ---- below the map --------------------------------------------------------------------------------------------
  const section = (title, ...content) => h('section', { 'aria-label': title }, h('h2', {}, title), ...content);
  const where = (finding) => {
    const steps = [finding.place.layer === undefined ? null : `layer ${finding.place.layer}`, finding.place.stage, finding.location?.buffer ?? finding.place.buffer];
    const at = finding.location;
    const number = (n) => `${n.value} (${n.bits})`;
    const tensors = (at?.tensors || []).map((t) => {
      const count = (c) => (c ? ` (${grouped(c.of)} of ${grouped(c.total)})` : '');
      const crumbs = [`${t.name} ${t.dtype}`];
      if (t.expert !== null) crumbs.push(`expert ${t.expert}${t.experts.length > 1 ? ` (and ${t.experts.length - 1} more)` : ''}`);
      if (t.row !== null) crumbs.push(`row ${t.row}${count(t.rows)}`);
      if (t.block !== null) crumbs.push(`${t.block_len > 1 ? `block ${t.block} of ${t.block_len}` : `block ${t.block}`}${count(t.blocks)}`);
      if (t.element !== null) crumbs.push(`element ${t.element}${count(t.elements)}`);
      return [h('ol', { class: 'path' }, crumbs.map((text) => h('li', {}, h('b', {}, text)))),
        t.contribution && h('p', { class: 'note' }, 'that weight came to ', h('code', {}, number(t.contribution[0])), ' and ', h('code', {}, number(t.contribution[1])))];
    });
    return section('Where', h('ol', { class: 'path' }, steps.filter(Boolean).map((text) => h('li', {}, h('b', {}, text)))), tensors,
      h('dl', { class: 'values' }, [
        ['class', h('b', {}, finding.class.kind)], ['run', finding.scenario], ['evidence', coded(finding.evidence)],
        at && ['wrong', `${grouped(at.wrong)} of ${grouped(at.total)} values of ${at.buffer}`],
        at && ['first', `[${at.index.join(', ')}]: row ${at.row}, token ${at.token} at position ${at.position}`],
        at && ['left', number(at.left)], at && ['right', number(at.right)],
      ].filter(Boolean).map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)])),
      (at?.notes || []).map((note) => h('p', { class: 'note' }, coded(note))));
  };
  const shared = (features) => section('What the failing places share', features.slice(0, 12).map((f) => {
    const bar = (cls, part, whole, name) => h('div', { class: cls }, h('i', {}, h('i', { style: `width:${whole ? (100 * part) / whole : 0}%` })), `${grouped(part)}/${grouped(whole)} ${name}`);
    return h('div', { class: 'feature' }, h('div', {}, h('code', {}, f.text), h('span', { class: 'dim' }, ` among ${f.among}, lift ${short(f.lift, 3)}`)),
      h('div', { class: 'bars' }, bar('fail', f.failing_with, f.failing, 'failing'), bar('pass', f.passing_with, f.passing, 'passing')));
  }));

  const drawRouting = (cell) => {
    const routing = byId('routing');
    routing.hidden = !view.runs.some((run) => run.steps.some((step) => step.routing.length));
    const found = here().routing.find((r) => r.layer === cell.layer);
    if (!found) {
      routing.replaceChildren(h('h2', {}, 'Routing'), h('p', { class: 'note' }, cell.layer === null ? 'No layer is chosen.' : 'Nothing was kept of the router of this layer in this step.'));
      return;
    }
    const step = here();
    const margins = found.rows.flatMap((r) => [r.left.margin, r.right?.margin]).filter((m) => m !== null && m !== undefined);
    const smallest = margins.length ? ` Smallest margin of those shown: ${short(Math.min(...margins))}.` : '';
    const chips = (choice, other) => h('div', { class: 'chips' }, choice.experts.map((id, i) => h('span', { class: other && other.experts[i] !== id ? 'other' : '' }, String(id))));
    const heads = compared ? ['row', 'position', 'token', 'left', 'right', 'margin left', 'margin right'] : ['row', 'position', 'token', 'experts by rank', 'margin'];
    routing.replaceChildren(h('h2', {}, `Routing in layer ${found.layer}`),
      h('p', { style: 'margin:0 0 8px' }, compared ? `${grouped(found.differing)} of ${grouped(found.total)} rows chose other experts, or in another order.` : `${grouped(found.total)} rows.`, smallest),
      h('div', { class: 'scroll', tabindex: '0' }, h('table', {}, h('thead', {}, h('tr', {}, heads.map((name) => h('th', { scope: 'col' }, name)))), h('tbody', {}, found.rows.map((r) => {
        const other = r.right || r.left;
        const head = [r.row, step.positions[r.row], step.tokens[r.row]].map((v) => h('td', {}, String(v)));
        const margin = (choice) => h('td', {}, choice.margin === null ? '–' : short(choice.margin));
        return h('tr', {}, head, compared ? [h('td', {}, chips(r.left, other)), h('td', {}, chips(other, r.left)), margin(r.left), margin(other)] : [h('td', {}, chips(r.left)), margin(r.left)]);
      })))),
      h('p', { class: 'note' }, 'Experts by rank. The margin is how far the last chosen scored above the first that was not, before softmax: an error larger than it turns the choice.'));
  };

  const command = ({ about, line }) => [h('div', {}, about), h('div', { class: 'command' }, h('pre', {}, line), h('button', { class: 'plain', type: 'button', onclick: async (event) => {
    const target = event.currentTarget;
    try { await navigator.clipboard.writeText(line); target.textContent = 'copied'; } catch { getSelection().selectAllChildren(target.previousSibling); }
  } }, 'copy'))];

  const drawMore = () => {
    const { finding } = view;
    byId('more').replaceChildren(...[
      finding && where(finding),
      finding && finding.features.length > 0 && shared(finding.features),
      view.reproduce.length > 0 && section('How to reproduce', view.reproduce.map(command)),
      view.reading.length > 0 && section('Reading', h('ol', { class: 'reading' }, view.reading.map((text) => h('li', {}, coded(text))))),
      section('What was run', h('dl', { class: 'values' },
        view.sides.map((side, i) => [h('dt', {}, compared ? sideNames[i] : 'device'), h('dd', {}, `${side.name}: ${side.rules}`)]),
        view.facts.map(([name, text]) => [h('dt', {}, name), h('dd', {}, text)]),
        [h('dt', {}, 'runs'), h('dd', {}, view.runs.map((run) => run.name).join(', '))],
        view.skipped.map(([name, why]) => [h('dt', {}, 'left out'), h('dd', {}, `${name}: ${why}`)]),
        [h('dt', {}, 'prompt'), h('dd', {}, `${view.prompt_ids.length} tokens: ${view.prompt_ids.slice(0, 64).join(' ')}${view.prompt_ids.length > 64 ? ' …' : ''}`)])),
    ].filter(Boolean));
  };
  byId('sides').append(...view.sides.map((side, i) => h('div', {}, compared && h('span', { class: 'swatch', style: `background:var(--${sideNames[i]})` }), h('span', { class: 'dim' }, compared ? sideNames[i] : 'device'), h('b', {}, side.name), h('span', { class: 'dim' }, side.rules))),
    h('div', {}, h('span', { class: 'dim' }, 'prompt'), h('b', {}, `${view.prompt_ids.length} token${view.prompt_ids.length === 1 ? '' : 's'}`)));

  // ---- all of it ------------------------------------------------------------------------------------------------
  const draw = () => { drawTools(); drawGrid(); choose(Math.min(state.cell, here().cells.length - 1), false); };
  const wanted = decodeURIComponent(location.hash.slice(1));
  drawMore();
  toFirst();
  const linked = here().cells.findIndex((cell) => key(cell) === wanted);
  if (linked >= 0) choose(linked, false);
  document.body.dataset.ready = 'true';
})();
