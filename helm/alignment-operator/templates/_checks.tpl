{{- /* What a schema cannot say, and what would go wrong only later. */ -}}
{{- define "alignment.checks" -}}
{{- if and .Values.monitoring.podMonitor.enabled .Values.monitoring.serviceMonitor.enabled }}
{{- fail "monitoring.podMonitor.enabled and monitoring.serviceMonitor.enabled are both true: every pod would be scraped twice; switch one of them off" }}
{{- end }}
{{- if and .Values.watchNamespaces .Values.test.namespace (not (has .Values.test.namespace .Values.watchNamespaces)) }}
{{- fail (printf "test.namespace is %s, which is not one of watchNamespaces (%s): nobody would carry out the test's run" .Values.test.namespace (join ", " .Values.watchNamespaces)) }}
{{- end }}
{{- $limits := list }}
{{- range .Values.limits }}
{{- if has .name $limits }}
{{- fail (printf "limits: two have the name %s, and a policy of one would take the other's place: each needs a name of its own" .name) }}
{{- end }}
{{- $limits = append $limits .name }}
{{- if and .largestRun (not .namespaces) }}
{{- fail (printf "limits of %s: largestRun needs namespaces by name in place of namespaceSelector: the operator enforces it, and has no right to read a namespace's labels" .name) }}
{{- end }}
{{- end }}
{{- if .Values.watchNamespaces }}
{{- /* Whoever makes ClusterRoles may look for one that is for all; others may not, and an install would fail. */ -}}
{{- if .Values.rbac.aggregate }}
{{- include "alignment.alone" (list $ "ClusterRoleBinding" "") }}
{{- end }}
{{- range .Values.watchNamespaces }}
{{- include "alignment.alone" (list $ "RoleBinding" .) }}
{{- end }}
{{- else }}
{{- include "alignment.alone" (list $ "ClusterRoleBinding" "") }}
{{- include "alignment.alone" (list $ "RoleBinding" "") }}
{{- end }}
{{- end }}

{{- /* Two operators for one namespace would both act on its runs, each with a Lease of its own. Root, kind, namespace. */ -}}
{{- define "alignment.alone" -}}
{{- $root := index . 0 -}}
{{- range (lookup "rbac.authorization.k8s.io/v1" (index . 1) (index . 2) "").items }}
{{- $labels := .metadata.labels | default dict }}
{{- $release := get $labels "app.kubernetes.io/instance" }}
{{- $home := get (.metadata.annotations | default dict) "meta.helm.sh/release-namespace" }}
{{- $ours := and (eq (get $labels "app.kubernetes.io/part-of") "alignment-operator") (eq (get $labels "app.kubernetes.io/component") "operator") }}
{{- if and $ours (not (hasSuffix "-leader" .metadata.name)) (or (ne $release $root.Release.Name) (ne $home $root.Release.Namespace)) }}
{{- $what := ternary (printf "namespace %s" .metadata.namespace) "all namespaces" (not (empty .metadata.namespace)) }}
{{- fail (printf "another operator (release %s in namespace %s) already has %s: uninstall it, or let the two watch different namespaces, both with watchNamespaces" ($release | default .metadata.name) ($home | default "unknown") $what) }}
{{- end }}
{{- end }}
{{- end }}
