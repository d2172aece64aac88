// What Grafana does between the data source and a panel: transformations, then field settings and overrides.
import {
  applyFieldOverrides,
  createFieldConfigRegistry,
  createTheme,
  fieldReducers,
  identityOverrideProcessor,
  ReducerID,
  standardFieldConfigEditorRegistry,
  standardTransformers,
  standardTransformersRegistry,
  transformDataFrame,
  type DataFrame,
  type FieldConfigPropertyItem,
} from '@grafana/data';
import { lastValueFrom } from 'rxjs';

export const theme = createTheme({ colors: { mode: 'dark' } });

// Grafana's editors for these settings are of no use here; that the settings exist must be known.
const STANDARD = [
  'unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'thresholds', 'mappings', 'links', 'filterable',
  'fieldMinMax', 'actions',
];
const CUSTOM = [
  'drawStyle', 'lineWidth', 'fillOpacity', 'showPoints', 'pointSize', 'spanNulls', 'stacking', 'axisSoftMin', 'axisPlacement',
  'scaleDistribution', 'align', 'cellOptions', 'filterable', 'width', 'minWidth', 'inspect', 'hideFrom', 'axisLabel',
];

const setting = (path: string, isCustom: boolean): FieldConfigPropertyItem =>
  ({
    id: isCustom ? `custom.${path}` : path,
    path,
    name: path,
    isCustom,
    shouldApply: () => true,
    process: identityOverrideProcessor,
    override: () => null,
    editor: () => null,
    settings: {},
  }) as unknown as FieldConfigPropertyItem;

standardFieldConfigEditorRegistry.setInit(() => STANDARD.map((path) => setting(path, false)));
standardTransformersRegistry.setInit(() =>
  [...new Map(Object.values(standardTransformers).map((one) => [one.id, one])).values()].map(
    (transformation) =>
      ({
        id: transformation.id,
        name: transformation.name,
        transformation: () => Promise.resolve(transformation),
        editor: () => null,
      }) as never
  )
);

const registry = createFieldConfigRegistry(
  {
    useCustomConfig: (builder) => {
      for (const path of CUSTOM) {
        builder.addCustomEditor({ ...setting(path, true), id: path } as never);
      }
    },
  },
  'panels'
);

export async function prepare(panel: any, frames: DataFrame[], values: Record<string, string>): Promise<DataFrame[]> {
  const fill = filler(values);
  const transformed = await lastValueFrom(transformDataFrame(panel.transformations ?? [], frames, { interpolate: fill }));
  return applyFieldOverrides({
    data: transformed,
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry: registry,
    replaceVariables: fill,
    theme,
    timeZone: 'utc',
  });
}

export function filler(values: Record<string, string>) {
  return (text?: string) => (text ?? '').replace(/\$\{?(\w+)\}?/g, (whole, name) => values[name] ?? whole);
}

export const reducers = (ids: string[]) => ids.map((id) => fieldReducers.get(id as ReducerID));
