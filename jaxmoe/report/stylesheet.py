"""The one style sheet of a report: colours as variables, for light and for dark screens.

Curves have the colours of Okabe and Ito (2008), lightened for dark screens; heatmaps go from blue
to orange. Both can be told apart with every common kind of colour blindness.
"""

from jaxmoe.report.html import STACKS

_STACKED = """
@media (max-width: %(below)s.98px) {
  .%(name)s thead { display: none; }
  .%(name)s, .%(name)s tbody { display: block; width: 100%%; }
  .%(name)s tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%%),
    1fr)); gap: 0 28px; border-bottom: 1px solid var(--line); padding: 5px 0; }
  .%(name)s td { display: flex; gap: 14px; justify-content: space-between; border: 0;
    padding: 1px 0; max-width: none; min-width: 0; white-space: normal; overflow-wrap: anywhere; }
  .%(name)s td:first-child { grid-column: 1 / -1; font-weight: 600; }
  .%(name)s td + td:empty { display: none; }
  .%(name)s td + td::before { content: attr(data-name); color: var(--soft); text-align: left; }
}
"""

_SHEET = """
:root { color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --text: #1b1c1e; --soft: #5c5f66; --line: #dcdcd8;
  --link: #0060a0; --bad: #a8290a; --bad-page: #fdeee8; --good: #0b6b4b;
  --s0: #0072b2; --s1: #d55e00; --s2: #008a64; --s3: #b8578c; --s4: #b57a00; --s5: #707680;
  --ramp0: #f0a030; --ramp1: #20409a; --strip: #00000012; --on-strong: #ffffff;
  --l0: #111111; --l1: #2166ac; --l2: #5c9bcd; --l3: #a3cae5; --l4: #d6e6f1; --l5: #f1f0ec;
  --l6: #fbdcb8; --l7: #f4a95c; --l8: #d9701a; --l9: #9a4200; }
@media (prefers-color-scheme: dark) { :root {
  --page: #141518; --card: #1d1f23; --text: #ececea; --soft: #a6a9b0; --line: #35383e;
  --link: #7cc0f4; --bad: #ff9d7a; --bad-page: #3a2018; --good: #54d0a4;
  --s0: #4fa9e6; --s1: #ff8b45; --s2: #2fc795; --s3: #e693c3; --s4: #f0c04c; --s5: #a8adb6;
  --ramp0: #ffd27a; --ramp1: #5b7df0; --strip: #ffffff16; --on-strong: #0c0d0f;
  --l0: #ffffff; --l1: #63b3f5; --l2: #3f8bc8; --l3: #2c6594; --l4: #274559; --l5: #33353a;
  --l6: #5a4327; --l7: #8f5a1d; --l8: #cf7a20; --l9: #ffb057; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 14px 12px 60px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 4px 0; }
h2 { font-size: 19px; margin: 38px 0 10px; padding-top: 10px; border-top: 1px solid var(--line); }
p { margin: 8px 0; max-width: 76ch; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 12px 0; font-size: 14px; }
.sub, .note, .unit, .scale { color: var(--soft); }
.note, .scale { font-size: 13px; }
.state { font-size: 13px; font-weight: 600; padding: 1px 9px; border-radius: 99px;
  color: var(--good); border: 1.5px solid; vertical-align: 3px; margin-left: 8px;
  white-space: nowrap; }
.state.bad { color: var(--bad); }
.alert { border-left: 4px solid var(--bad); background: var(--bad-page); padding: 8px 14px;
  border-radius: 4px; margin: 14px 0; max-width: none; }
.alert ul { margin: 4px 0; padding-left: 20px; columns: 340px;
  column-gap: 32px; }
.tiles { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px;
  margin: 14px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 12px; min-width: 0; container-type: inline-size; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.tile b { display: block; font-size: clamp(10.5px, calc(100cqw / (0.64 * var(--n))), 21px);
  line-height: 27px; font-weight: 650; white-space: nowrap; }
.tile:last-child:nth-child(odd) { grid-column: span 2; }
.grid { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px; margin: 12px 0; }
@media (min-width: 760px) {
  .tiles { grid-template-columns: repeat(var(--middle), minmax(0, 1fr)); }
}
@media (min-width: 1240px) {
  .tiles { grid-template-columns: repeat(var(--wide), minmax(0, 1fr)); }
  .tile:last-child:nth-child(odd) { grid-column: auto; }
}
@media (min-width: 720px) and (max-width: 1079.98px) {
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .grid > :last-child:nth-child(odd) { grid-column: 1 / -1; }
  .grid > :last-child:nth-child(odd) svg { font-size: 7px; }
}
/* Three in a row of six columns; where one or two are left over, the last rows have two. */
@media (min-width: 1080px) {
  .grid { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .grid > * { grid-column: span 2; }
  .grid > :nth-child(3n + 1):nth-last-child(2), .grid > :nth-child(3n + 1):nth-last-child(2) ~ *,
  .grid > :nth-child(3n + 1):nth-last-child(4), .grid > :nth-child(3n + 1):nth-last-child(4) ~ * {
    grid-column: span 3; }
  .grid > :only-child { grid-column: 1 / -1; }
  /* A picture that is larger has its letters in the same size. */
  .grid > :nth-child(3n + 1):nth-last-child(2) svg,
  .grid > :nth-child(3n + 1):nth-last-child(2) ~ * svg,
  .grid > :nth-child(3n + 1):nth-last-child(4) svg,
  .grid > :nth-child(3n + 1):nth-last-child(4) ~ * svg, .grid > :only-child svg {
    font-size: 7.5px; }
}
.card { margin: 0; padding: 10px 8px 8px; background: var(--card); min-width: 0;
  border: 1px solid var(--line); border-radius: 8px; }
.card p { margin: 4px 6px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px;
  margin: 0 6px 4px; }
figcaption .unit { font-size: 13px; }
.switch { font-size: 13px; color: var(--soft); white-space: nowrap; cursor: pointer; }
.switch input { vertical-align: -2px; margin: 0 1px 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0 6px 4px; font-size: 13px;
  color: var(--soft); }
.legend b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px;
  vertical-align: 3px; margin-right: 5px; }
.legend i.ramp { width: 90px; margin: 0 6px; height: 6px; vertical-align: 1px;
  background: linear-gradient(in oklab to right, var(--ramp0), var(--ramp1)); }
.scale span { white-space: nowrap; margin-right: 10px; display: inline-block; }
.scale i { display: inline-block; width: 16px; height: 12px; margin-right: 4px;
  vertical-align: -1px; border: 1px solid var(--line); }
.logged { display: none; }
.card:has(.uselog:checked) .linear { display: none; }
.card:has(.uselog:checked) .logged { display: block; }
svg { display: block; width: 100%; max-width: 620px; height: auto; margin: 0 auto;
  font-size: 11.5px; }
svg text { fill: var(--text); font-variant-numeric: tabular-nums; }
svg text.unit { fill: var(--soft); }
svg text.strong { fill: var(--on-strong); }
svg text.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg path, svg line { vector-effect: non-scaling-stroke; }
.axis { stroke: var(--soft); stroke-width: 1; }
line.grid { stroke: var(--line); stroke-width: 1; }
.level { stroke: var(--text); stroke-width: 1.2; stroke-dasharray: 5 4; opacity: .75; }
.curve, .thin { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.thin { stroke-width: 1.1; }
.band { opacity: .22; }
.strip { fill: transparent; }
.strip:hover { fill: var(--strip); }
.mark { fill: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th.text, td.text { text-align: left; max-width: 60ch; }
td.text:nth-child(3) { overflow-wrap: anywhere; min-width: 160px; }
td:not(.text) { white-space: nowrap; }
.swatch { white-space: nowrap; }
.swatch i { display: inline-block; width: 16px; height: 12px; margin-right: 6px;
  vertical-align: -1px; }
.bar { display: flex; height: 30px; border-radius: 6px; overflow: hidden; margin: 12px 0 6px;
  gap: 1px; background: var(--card); }
.bar i { display: block; min-width: 1px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--link); }
pre { margin: 6px 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
"""

STYLE = _SHEET + "".join(_STACKED % {"name": f"below{n}", "below": n - 1} for n in STACKS)
