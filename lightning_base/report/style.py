"""How the page looks: narrow and wide screens, light and dark."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d5dae0; --band: #f4f6f8;
  --accent: #0b5fa5; --warn: #8a3b00; --warn-paper: #fff4e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a2acb6; --paper: #14171a; --line: #353b42;
  --band: #1d2126; --accent: #79b8f0; --warn: #ffc48a; --warn-paper: #33230f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 84rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2rem); }
header { padding-top: 2.5rem; }
main { padding-bottom: 4rem; }
.kicker { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .04em; }
h1 { margin: 0 0 1rem; font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; font-size: 1.4rem; overflow-wrap: anywhere; }
h3 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
h4 { margin: .8rem 0 .3rem; font-size: 1rem; }
.comparison + .comparison { border-top: 3px solid var(--line); margin-top: 3rem; }
.summary { max-width: 52rem; }
.lead { font-size: 1.15rem; font-weight: 600; margin: 0 0 .6rem; }
.summary ul, .apart ul { margin: 0; padding-left: 1.2rem; }
.summary li { margin: .25rem 0; }
.caution, .apart { max-width: 60rem; margin: 1rem 0; padding: .6rem .9rem; color: var(--warn); overflow-wrap: anywhere;
  font-size: .9rem;  background: var(--warn-paper); border-left: 4px solid currentColor; }
.apart p { font-weight: 600; } .caution p, .apart p { margin: 0 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .45rem; text-align: right; }
thead th { vertical-align: bottom; font-weight: 600; min-width: 2.2rem; }
thead tr:last-child th { border-bottom: 2px solid var(--ink); }
tr.groups th { text-align: left; color: var(--soft); font-weight: 500; font-size: .8rem; padding-bottom: 0; }
tr.groups th:not(:empty) { border-bottom: 1px solid var(--line); }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr.next:not(:first-child) { border-top: 2px solid var(--soft); }
tbody tr:nth-child(even) { background: var(--band); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tbody tr:nth-child(even) th:first-child { background: var(--band); }
th.words, td.words { text-align: left; }
td.best { font-weight: 700; color: var(--accent); }
.note { max-width: 60rem; margin: .5rem 0 0; color: var(--soft); font-size: .9rem; }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure.wide img { min-width: 24rem; }
figure .scroll { width: fit-content; max-width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .4rem; }
figure img { display: block; width: 100%; min-width: 19rem; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; max-width: 60rem; }
.facts { display: grid; gap: .2rem 1.5rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); font-size: .9rem; }
.facts div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line); }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.help { margin: .8rem 0; color: var(--soft); font-size: .85rem; columns: 26rem; column-gap: 2rem; }
.help div { break-inside: avoid; margin-bottom: .3rem; }
.help dt, .help dd { display: inline; } .help dt { font-weight: 600; color: var(--ink); }
.help dt::after { content: ":"; }
details { margin: .4rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; min-width: 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } small { color: var(--soft); }
pre { overflow-x: auto; background: var(--band); padding: .7rem; border-radius: 6px; font-size: .8rem;
  line-height: 1.4; }
.state { color: var(--warn); border: 1px solid currentColor; border-radius: 4px; padding: 0 .3rem; font-size: .85rem; }
.leftout li { margin: .4rem 0; overflow-wrap: anywhere; }
td.words, tbody th { min-width: 6rem; overflow-wrap: anywhere; }
@media print { details { display: none; } .scroll { overflow: visible; } table { font-size: .7rem; } }
"""
