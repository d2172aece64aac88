{{- define "alignment.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* Room is left for what is appended to it. */ -}}
{{- define "alignment.fullname" -}}
{{- $name := include "alignment.name" . -}}
{{- $joined := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{ .Values.fullnameOverride | default $joined | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "alignment.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default (ternary (include "alignment.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- /* What finds the operator's pods; a Deployment's may never change. */ -}}
{{- define "alignment.selector" -}}
app.kubernetes.io/name: {{ include "alignment.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "alignment.labels" -}}
{{- $own := include "alignment.selector" . | fromYaml }}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") }}
{{- $_ := set $own "app.kubernetes.io/version" .Chart.AppVersion }}
{{- $_ := set $own "app.kubernetes.io/managed-by" .Release.Service }}
{{- $_ := set $own "app.kubernetes.io/part-of" "alignment-operator" }}
{{- toYaml (merge $own .Values.commonLabels) }}
{{- end }}

{{- /* An image of the values as one line; the arguments are the root and the image. */ -}}
{{- define "alignment.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $registry := $root.Values.global.imageRegistry | default $image.registry -}}
{{- $version := ternary (printf "@%s" $image.digest) (printf ":%s" ($image.tag | default $root.Chart.AppVersion)) (not (empty $image.digest)) -}}
{{ with $registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}{{ $version }}
{{- end }}

{{- define "alignment.testNamespace" -}}
{{ .Values.test.namespace | default (first .Values.watchNamespaces) | default .Release.Namespace }}
{{- end }}

{{- /* For the operator: what runs of some namespaces may take at once. */ -}}
{{- define "alignment.largest" -}}
{{- $found := list -}}
{{- range .Values.limits -}}
{{- if .largestRun -}}
{{- $most := dict -}}
{{- range $what, $amount := .largestRun -}}{{- $_ := set $most $what (int $amount) -}}{{- end -}}
{{- $found = append $found (dict "namespaces" .namespaces "most" $most) -}}
{{- end -}}
{{- end -}}
{{- with $found -}}{{ toJson . }}{{- end -}}
{{- end }}
