// A dashboard's JSON by Grafana's published types. Those leave a panel's options and a query open; here they are closed.
import type * as schema from '@grafana/schema';
import type * as barGauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as stateTimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeSeries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type * as trend from '@grafana/schema/dist/esm/raw/composable/trend/panelcfg/x/TrendPanelCfg_types.gen';

/** An enum's value stands in JSON as a word or a number. */
type Json<T> = T extends string
  ? `${T}`
  : T extends number
    ? number
    : T extends Array<infer Item>
      ? Array<Json<Item>>
      : T extends object
        ? { [Key in keyof T]: Json<T[Key]> }
        : T;

interface PrometheusQuery {
  refId: string;
  datasource: { type: 'prometheus'; uid: '${datasource}' };
  expr: string;
  legendFormat: string;
  range: boolean;
  instant: boolean;
  format: 'time_series' | 'table' | 'heatmap';
}

type Defaults = Omit<schema.FieldConfig, 'custom'>;

interface PanelOf<Type extends string, Options, Custom> {
  type: Type;
  options: Json<Options>;
  targets: PrometheusQuery[];
  fieldConfig: {
    defaults: Json<Defaults> & { custom?: Json<Partial<Custom>> };
    overrides: Array<{ matcher: { id: string; options: string }; properties: Array<{ id: string; value: unknown }> }>;
  };
}

type Common = Json<Required<Pick<schema.Panel, 'id' | 'title' | 'description' | 'gridPos' | 'datasource'>>> &
  Json<Pick<schema.Panel, 'transformations' | 'maxDataPoints'>>;

export type Panel = Common &
  (
    | PanelOf<'timeseries', timeSeries.Options, timeSeries.FieldConfig>
    | PanelOf<'trend', trend.Options, trend.FieldConfig>
    | PanelOf<'stat', stat.Options, never>
    | PanelOf<'bargauge', barGauge.Options, never>
    | PanelOf<'table', table.Options, table.FieldConfig>
    | PanelOf<'state-timeline', stateTimeline.Options, stateTimeline.FieldConfig>
  );

/** What the Prometheus data source adds to an annotation. */
interface PrometheusAnnotation {
  expr?: string;
  step?: string;
  titleFormat?: string;
  useValueForTime?: boolean;
  target?: { refId: string; expr: string; interval: string };
}

export type Dashboard = Omit<Json<Omit<schema.Dashboard, 'panels' | 'annotations' | 'templating'>>, never> & {
  panels: Array<Panel | Json<schema.RowPanel>>;
  annotations: { list: Array<Json<Omit<schema.AnnotationQuery, 'target'>> & PrometheusAnnotation> };
  templating: { list: Array<Json<schema.VariableModel>> };
};
