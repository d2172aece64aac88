// Draws a dashboard from window.INPUT, which picture.py fills in, and says in the title when it is done.
import { dateTime, DashboardCursorSync, EventBusSrv, type DataFrame } from '@grafana/data';
import { GlobalStyles, PanelChrome, PanelContextProvider, ThemeContext } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import 'uplot/dist/uPlot.min.css';
import { framesOf, type Answer } from './frames';
import { Panel } from './panels';
import { filler, prepare, theme } from './prepare';

interface Input {
  board: any;
  answers: Record<string, Answer[]>;
  values: Record<string, string>;
  start: number;
  end: number;
}

const { board, answers, values, start, end } = (window as unknown as { INPUT: Input }).INPUT;
const CELL = 30, GAP = 8, COLUMN = 1600 / 24;
const range = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now-6h', to: 'now' } };
const events = new EventBusSrv();
const context = {
  eventsScope: 'global', eventBus: events, sync: () => DashboardCursorSync.Off, canAddAnnotations: () => false,
} as never;

function Board({ prepared }: { prepared: Map<number, DataFrame[]> }) {
  const fill = filler(values);
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles isExtensionSidebarOpen={false} />
      <PanelContextProvider value={context}>
        <h1 style={{ fontSize: 20, margin: '10px 8px 2px' }}>{board.title}</h1>
        <div style={{ margin: '0 8px 8px', color: theme.colors.text.secondary }}>
          {Object.entries(values).map(([name, value]) => `${name}: ${value || '–'}`).join('   ·   ')}
        </div>
        <div style={{ position: 'relative', width: 1600, height: bottom() }}>
          {board.panels.map((panel: any) => {
            const { x, y, w, h } = panel.gridPos;
            const width = w * COLUMN - GAP, height = h * (CELL + GAP) - GAP;
            const style = { position: 'absolute', left: x * COLUMN + GAP / 2, top: y * (CELL + GAP), width, height } as const;
            if (panel.type === 'row') {
              return <div key={panel.id} style={{ ...style, fontSize: 16, paddingTop: 6 }}>⌄ {fill(panel.title)}</div>;
            }
            return (
              <div key={panel.id} style={style}>
                <PanelChrome title={fill(panel.title)} width={width} height={height}>
                  {(inner, tall) => <Panel panel={panel} frames={prepared.get(panel.id) ?? []} width={inner} height={tall} range={range} />}
                </PanelChrome>
              </div>
            );
          })}
        </div>
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
}

const bottom = () => Math.max(...board.panels.map((panel: any) => (panel.gridPos.y + panel.gridPos.h) * (CELL + GAP)));

async function main() {
  const prepared = new Map<number, DataFrame[]>();
  for (const panel of board.panels.filter((one: any) => one.type !== 'row')) {
    prepared.set(panel.id, await prepare(panel, framesOf(answers[panel.id]), values));
  }
  document.body.style.cssText = `background:${theme.colors.background.canvas};color:${theme.colors.text.primary};margin:0`;
  createRoot(document.getElementById('board')!).render(<Board prepared={prepared} />);
  setTimeout(() => (document.title = 'drawn'), 2500);
}

main().catch((error) => { document.title = `failed: ${error?.stack ?? error}`; });
