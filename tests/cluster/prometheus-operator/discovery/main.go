// Command discovery is Prometheus' own Kubernetes discovery for a Prometheus that was built without it, as Debian's is.
//
// Its argument is a file with a list of kubernetes_sd_configs; what number N of them finds is always in FILE.N.json, for
// file_sd_configs.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"log/slog"
	"os"

	client "github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/discovery/kubernetes"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"gopkg.in/yaml.v2"
)

type entry struct {
	Targets []string       `json:"targets"`
	Labels  model.LabelSet `json:"labels"`
}

func main() {
	text, err := os.ReadFile(os.Args[1])
	check(err)
	var configs []*kubernetes.SDConfig
	check(yaml.UnmarshalStrict(text, &configs))
	for number, config := range configs {
		go follow(config, fmt.Sprintf("%s.%d.json", os.Args[1], number))
	}
	select {}
}

func follow(config *kubernetes.SDConfig, out string) {
	registry := client.NewRegistry()
	metrics := config.NewDiscovererMetrics(registry, discovery.NewRefreshMetrics(registry))
	discoverer, err := config.NewDiscoverer(discovery.DiscovererOptions{Logger: slog.Default(), Metrics: metrics})
	check(err)
	updates := make(chan []*targetgroup.Group)
	go discoverer.Run(context.Background(), updates)
	known := map[string]*targetgroup.Group{}
	for groups := range updates {
		for _, group := range groups {
			known[group.Source] = group // without targets when it has gone
		}
		write(out, entries(known))
	}
}

func entries(groups map[string]*targetgroup.Group) []entry {
	found := []entry{}
	for _, group := range groups {
		for _, target := range group.Targets {
			labels := group.Labels.Merge(target)
			address := string(labels[model.AddressLabel])
			delete(labels, model.AddressLabel)
			found = append(found, entry{[]string{address}, labels})
		}
	}
	return found
}

// At once or not at all: Prometheus reads it whenever it changes.
func write(out string, found []entry) {
	text, err := json.Marshal(found)
	check(err)
	check(os.WriteFile(out+".part", text, 0o600))
	check(os.Rename(out+".part", out))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
