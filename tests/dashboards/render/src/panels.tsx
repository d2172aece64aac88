// Panels drawn with Grafana's components. State time lines have none outside a Grafana server: those are drawn here.
import {
  dateTime,
  FieldType,
  getFieldDisplayValues,
  outerJoinDataFrames,
  VizOrientation,
  type DataFrame,
  type TimeRange,
} from '@grafana/data';
import { BigValueGraphMode, BigValueJustifyMode, BigValueTextMode, BigValueColorMode } from '@grafana/schema';
import { BarGauge, BigValue, Table, TimeSeries } from '@grafana/ui';
import { theme } from './prepare';

interface Props {
  panel: any;
  frames: DataFrame[];
  width: number;
  height: number;
  range: TimeRange;
}

export function Panel(props: Props) {
  const { panel, frames } = props;
  const empty = frames.every((frame) => frame.length === 0 || frame.fields.length < 2);
  if (empty) {
    const big = panel.type === 'stat';
    const style = { ...center(props), fontSize: big ? 24 : 15, color: theme.colors.text.secondary };
    return <div style={style}>{panel.fieldConfig.defaults.noValue}</div>;
  }
  const draw = { timeseries: Lines, trend: Lines, stat: Stat, bargauge: Bars, table: Rows, 'state-timeline': Timeline }[panel.type as string];
  return draw ? draw(props) : <div>{panel.type}?</div>;
}

const center = ({ width, height }: Props) =>
  ({ width, height, display: 'flex', alignItems: 'center', justifyContent: 'center', textAlign: 'center' }) as const;

function Lines({ panel, frames, width, height, range }: Props) {
  const timeless = panel.type === 'trend';
  return (
    <TimeSeries
      frames={frames}
      structureRev={1}
      theme={theme}
      width={width}
      height={height}
      timeRange={range}
      timeZone="utc"
      legend={{ ...panel.options.legend, calcs: panel.options.legend.calcs }}
      options={panel.options}
      {...(timeless ? { preparePlotFrame: (all: DataFrame[]) => outerJoinDataFrames({ frames: all, keepOriginIndices: true }) ?? null } : {})}
    >
      {() => null}
    </TimeSeries>
  );
}

function displays({ panel, frames }: Props) {
  return getFieldDisplayValues({
    fieldConfig: panel.fieldConfig,
    reduceOptions: panel.options.reduceOptions,
    data: frames,
    theme,
    replaceVariables: (text: string) => text,
    timeZone: 'utc',
  });
}

function Stat(props: Props) {
  const all = displays(props);
  const width = props.width / all.length;
  return (
    <div style={{ display: 'flex' }}>
      {all.map((one, i) => (
        <BigValue
          key={i}
          value={{ ...one.display, title: all.length > 1 ? one.display.title : undefined }}
          width={width}
          height={props.height}
          theme={theme}
          colorMode={BigValueColorMode.Value}
          graphMode={BigValueGraphMode.None}
          justifyMode={BigValueJustifyMode.Center}
          textMode={all.length > 1 ? BigValueTextMode.ValueAndName : BigValueTextMode.Value}
        />
      ))}
    </div>
  );
}

function Bars(props: Props) {
  const all = displays(props);
  const height = Math.min(props.panel.options.maxVizHeight, props.height / all.length - 6);
  return (
    <div style={{ overflow: 'hidden', height: props.height }}>
      {all.map((one, i) => (
        <div key={i} style={{ marginBottom: 6 }}>
          <BarGauge
            value={one.display}
            field={one.field}
            display={one.view?.getFieldDisplayProcessor(one.colIndex ?? 0)}
            width={props.width}
            height={Math.max(height, props.panel.options.minVizHeight)}
            orientation={VizOrientation.Horizontal}
            displayMode={props.panel.options.displayMode}
            valueDisplayMode={props.panel.options.valueMode}
            namePlacement={props.panel.options.namePlacement}
            showUnfilled={props.panel.options.showUnfilled}
            alignmentFactors={{ title: longest(all), text: '100.0 %' } as never}
            theme={theme}
          />
        </div>
      ))}
    </div>
  );
}

const longest = (all: Array<{ display: { title?: string } }>) =>
  all.map((one) => one.display.title ?? '').reduce((a, b) => (a.length > b.length ? a : b), '');

function Rows({ panel, frames, width, height }: Props) {
  return <Table data={frames[0]} width={width} height={height} initialSortBy={panel.options.sortBy} cellHeight={panel.options.cellHeight} />;
}

function Timeline({ frames, width, height, range }: Props) {
  const longestName = Math.max(...frames.map((frame) => (frame.fields[1].config.displayNameFromDS ?? '').length));
  const left = longestName * 7.5 + 20, foot = 44;
  const from = range.from.valueOf(), to = range.to.valueOf();
  const x = (at: number) => left + ((at - from) / (to - from)) * (width - left);
  const row = Math.min((height - foot) / frames.length, 40);
  const seen = new Map<string, string>();
  const text = theme.colors.text.primary;
  const bars = frames.flatMap((frame, i) => {
    const [time, value] = frame.fields;
    const step = time.config.interval ?? 15000;
    const spans: Array<{ begin: number; end: number; value: number }> = [];
    frame.fields[1].values.forEach((state: number, j: number) => {
      const at = time.values[j], last = spans[spans.length - 1];
      if (last && last.value === state && at - last.end < 4 * step) { last.end = at + step; }
      else { spans.push({ begin: at, end: at + step, value: state }); }
    });
    return spans.map((span, j) => {
      const shown = value.display!(span.value);
      seen.set(shown.text, shown.color ?? text);
      const wide = x(Math.min(span.end, to)) - x(span.begin);
      return (
        <g key={`${i}-${j}`}>
          <rect x={x(span.begin)} y={i * row + 2} width={Math.max(wide, 1)} height={row * 0.85} fill={shown.color} opacity={0.85} />
          {wide > 60 && <text x={x(span.begin) + wide / 2} y={i * row + row / 2 + 3} textAnchor="middle" fontSize={11} fill="#fff">{shown.text}</text>}
        </g>
      );
    });
  });
  const ticks = [0, 1, 2, 3, 4, 5, 6].map((n) => from + ((to - from) * n) / 6);
  return (
    <div>
      <svg width={width} height={height - 20} style={{ fontFamily: theme.typography.fontFamily }}>
        {bars}
        {frames.map((frame, i) => (
          <text key={i} x={left - 8} y={i * row + row / 2 + 4} textAnchor="end" fontSize={12} fill={text}>{frame.fields[1].config.displayNameFromDS}</text>
        ))}
        {ticks.slice(0, -1).map((at, i) => (
          <text key={i} x={x(at)} y={frames.length * row + 16} fontSize={12} fill={text}>{dateTime(at).utc().format('HH:mm')}</text>
        ))}
      </svg>
      <div style={{ display: 'flex', gap: 16, fontSize: 12 }}>
        {[...seen].map(([name, color]) => (
          <span key={name}><span style={{ display: 'inline-block', width: 14, height: 4, background: color, marginRight: 6, verticalAlign: 'middle' }} />{name}</span>
        ))}
      </div>
    </div>
  );
}
