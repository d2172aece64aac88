// Prometheus' answers as data frames, as Grafana's Prometheus data source makes them.
import { createDataFrame, FieldType, type DataFrame } from '@grafana/data';

export interface Answer {
  refId: string;
  format: 'time_series' | 'table';
  legend: string;
  /** Seconds between two points. */
  step: number;
  series: Array<{ labels: Record<string, string>; points: Array<[number, number | null]> }>;
}

export function framesOf(answers: Answer[]): DataFrame[] {
  const several = answers.length > 1;
  return answers.flatMap((answer) => (answer.format === 'table' ? [tableOf(answer, several)] : seriesOf(answer)));
}

function seriesOf(answer: Answer): DataFrame[] {
  return answer.series.map(({ labels, points }) =>
    createDataFrame({
      refId: answer.refId,
      fields: [
        { name: 'Time', type: FieldType.time, config: { interval: answer.step * 1000 }, values: points.map(([at]) => at * 1000) },
        {
          name: 'Value',
          type: FieldType.number,
          labels,
          config: { displayNameFromDS: nameOf(answer.legend, labels) },
          values: points.map(([, value]) => value),
        },
      ],
    })
  );
}

function tableOf(answer: Answer, several: boolean): DataFrame {
  const labels = [...new Set(answer.series.flatMap((one) => Object.keys(one.labels)))].sort();
  const column = (label: string) => answer.series.map((one) => one.labels[label] ?? '');
  return createDataFrame({
    refId: answer.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: answer.series.map((one) => one.points[0][0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, values: column(label) })),
      {
        name: several ? `Value #${answer.refId}` : 'Value',
        type: FieldType.number,
        values: answer.series.map((one) => one.points[0][1]),
      },
    ],
  });
}

export function nameOf(legend: string, labels: Record<string, string>): string {
  return legend ? legend.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? '') : Object.values(labels).join(', ') || 'Value';
}
