package main

import (
	"bufio"
	_ "crypto/sha256" // go-digest takes the algorithms that are linked, as they are into the kubelet
	_ "crypto/sha512"
	"encoding/json"
	"os"
	"strings"

	"github.com/distribution/reference"
	"k8s.io/apimachinery/pkg/util/validation"
)

func main() {
	out := json.NewEncoder(os.Stdout)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var text string
		if err := json.Unmarshal(lines.Bytes(), &text); err != nil {
			panic(err)
		}
		_, err := reference.ParseNormalizedNamed(text)
		out.Encode([]any{text, map[string]bool{
			"subdomain":  len(validation.IsDNS1123Subdomain(text)) == 0,
			"qualified":  len(validation.IsQualifiedName(text)) == 0,
			"annotation": len(validation.IsQualifiedName(strings.ToLower(text))) == 0,
			"value":      len(validation.IsValidLabelValue(text)) == 0,
			"image":      err == nil,
		}})
	}
}
