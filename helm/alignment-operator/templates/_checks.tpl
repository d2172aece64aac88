{{- /* What a schema cannot say, and what would go wrong only later. */ -}}
{{- define "alignment.checks" -}}
{{- if and .Values.monitoring.podMonitor.enabled .Values.monitoring.serviceMonitor.enabled }}
{{- fail "monitoring.podMonitor.enabled and monitoring.serviceMonitor.enabled are both true: every pod would be scraped twice; switch one of them off" }}
{{- end }}
{{- if and .Values.watchNamespaces .Values.test.namespace (not (has .Values.test.namespace .Values.watchNamespaces)) }}
{{- fail (printf "test.namespace is %s, which is not one of watchNamespaces (%s): nobody would carry out the test's run" .Values.test.namespace (join ", " .Values.watchNamespaces)) }}
{{- end }}
{{- range ternary .Values.watchNamespaces (list "") (not (empty .Values.watchNamespaces)) }}
{{- include "alignment.alone" (list $ .) }}
{{- end }}
{{- end }}

{{- /* Two operators for one namespace would both act on its runs, each with a Lease of its own. */ -}}
{{- define "alignment.alone" -}}
{{- $root := index . 0 -}}
{{- $namespace := index . 1 -}}
{{- $kind := ternary "RoleBinding" "ClusterRoleBinding" (not (empty $namespace)) -}}
{{- range (lookup "rbac.authorization.k8s.io/v1" $kind $namespace "").items }}
{{- $labels := .metadata.labels | default dict }}
{{- $release := get $labels "app.kubernetes.io/instance" }}
{{- $home := get (.metadata.annotations | default dict) "meta.helm.sh/release-namespace" }}
{{- $ours := and (eq (get $labels "app.kubernetes.io/part-of") "alignment-operator") (eq (get $labels "app.kubernetes.io/component") "operator") }}
{{- if and $ours (not (hasSuffix "-leader" .metadata.name)) (or (ne $release $root.Release.Name) (ne $home $root.Release.Namespace)) }}
{{- fail (printf "another operator (release %s in namespace %s) already has %s: uninstall it, or list other namespaces in watchNamespaces" ($release | default .metadata.name) $home (ternary (printf "namespace %s" $namespace) "all namespaces" (not (empty $namespace)))) }}
{{- end }}
{{- end }}
{{- end }}
