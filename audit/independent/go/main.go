// Command skms-go-verify checks an exported audit log offline, over the Go toolchain's own transparency log packages
// (golang.org/x/mod/sumdb/note and tlog), which also guard Go's checksum database. No code in common with the service.
//
//	skms-go-verify DIR --trust trust.txt [--receipts FILE] [--checkpoint FILE] [--policy FILE] [--accept-unanchored] [--json]
//
// Exit status: 0 intact, 1 tampered (E_ codes), 2 cannot tell (U_ codes), 3 usage.
package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

type rule func(map[string]bool) bool

type trust struct {
	origin    string
	keys      []publicKey
	logKeys   []note.Verifier
	witnesses map[string]note.Verifier
	quorum    rule
}

// words calls each with the words of every line; `#` begins a comment, in a policy only where it begins a line.
func words(path string, policy bool, each func([]string) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for number, line := range strings.Split(string(data), "\n") {
		if !policy {
			line, _, _ = strings.Cut(line, "#")
		}
		if fields := strings.Fields(line); len(fields) > 0 && !strings.HasPrefix(fields[0], "#") {
			if err := each(fields); err != nil {
				return fmt.Errorf("%s, line %d: %w", path, number+1, err)
			}
		}
	}
	return nil
}

func (t *trust) witness(name, vkey string) error {
	verifier, err := parseVkey(vkey)
	if err != nil {
		return err
	}
	for known, v := range t.witnesses {
		if known == name || v.Name() == verifier.Name() && v.KeyHash() == verifier.KeyHash() {
			return errors.New("a witness stands twice")
		}
	}
	t.witnesses[name] = verifier
	return nil
}

func atLeast(count int, members []rule) rule {
	return func(signed map[string]bool) bool {
		found := 0
		for _, member := range members {
			if member(signed) {
				found++
			}
		}
		return found >= count
	}
}

func isIn(name string) rule { return func(signed map[string]bool) bool { return signed[name] } }

func loadTrust(path string) (*trust, error) {
	t := &trust{witnesses: map[string]note.Verifier{}}
	var spkis [][]byte
	quorum := -1
	err := words(path, false, func(w []string) error {
		switch {
		case len(w) == 2 && w[0] == "origin" && t.origin == "":
			t.origin = w[1]
		case len(w) == 2 && w[0] == "key":
			spki, err := base64.StdEncoding.DecodeString(w[1])
			if err != nil {
				return err
			}
			spkis = append(spkis, spki)
		case len(w) == 3 && w[0] == "witness":
			return t.witness(w[1], w[2])
		case len(w) == 2 && w[0] == "quorum" && quorum < 0:
			count, err := strconv.Atoi(w[1])
			if err != nil || count < 1 || strconv.Itoa(count) != w[1] {
				return errors.New("a quorum is a number from 1")
			}
			quorum = count
		default:
			return errors.New("expected `origin`, `key`, `witness` or `quorum`")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, spki := range spkis {
		verifier, key, err := logVerifier(t.origin, spki)
		if err != nil {
			return nil, err
		}
		t.logKeys, t.keys = append(t.logKeys, verifier), append(t.keys, key)
	}
	if t.origin == "" || len(t.keys) == 0 {
		return nil, fmt.Errorf("%s: needs one origin and at least one key", path)
	}
	if quorum > len(t.witnesses) {
		return nil, fmt.Errorf("%s: a quorum of %d of %d witnesses", path, quorum, len(t.witnesses))
	}
	if quorum >= 0 {
		var members []rule
		for name := range t.witnesses {
			members = append(members, isIn(name))
		}
		t.quorum = atLeast(quorum, members)
	}
	return t, nil
}

// loadPolicy takes witnesses and quorum from a C2SP tlog-policy file; its log lines are left to the trust file.
func (t *trust) loadPolicy(path string) error {
	t.witnesses, t.quorum = map[string]note.Verifier{}, nil
	rules, grouped, decided := map[string]rule{}, map[string]bool{}, false
	err := words(path, true, func(w []string) error {
		free := len(w) > 1 && rules[w[1]] == nil && w[1] != "none"
		switch {
		case w[0] == "log" && (len(w) == 2 || len(w) == 3):
		case w[0] == "witness" && (len(w) == 3 || len(w) == 4) && free:
			rules[w[1]] = isIn(w[1])
			if err := t.witness(w[1], w[2]); err != nil {
				return err
			}
			if v, is := t.witnesses[w[1]].(*signer); !is || !v.cosigner {
				return errors.New("a witness signs with a cosignature key (type 04)")
			}
		case w[0] == "group" && len(w) > 3 && free:
			var members []rule
			for i, name := range w[3:] {
				if rules[name] == nil || grouped[name] || slices.Contains(w[3:3+i], name) {
					return fmt.Errorf("%s is not known by then, or stands in a group already", name)
				}
				members = append(members, rules[name])
			}
			for _, name := range w[3:] {
				grouped[name] = true
			}
			count, err := strconv.Atoi(w[2])
			if w[2] == "any" {
				count, err = 1, nil
			} else if w[2] == "all" {
				count, err = len(members), nil
			}
			if err != nil || count < 1 || count > len(members) {
				return errors.New("a group needs any, all, or a number of its members")
			}
			rules[w[1]] = atLeast(count, members)
		case w[0] == "quorum" && len(w) == 2 && !decided && (w[1] == "none" || rules[w[1]] != nil):
			decided, t.quorum = true, rules[w[1]]
		default:
			return errors.New("not a line of a tlog-policy")
		}
		return nil
	})
	if err == nil && !decided {
		err = fmt.Errorf("%s: names no quorum", path)
	}
	return err
}

var receipt = regexp.MustCompile(`^log="([a-z0-9._/-]{1,128})", seq=(0|[1-9][0-9]{0,15}), leaf=:([A-Za-z0-9+/]{43}=):$`)

func loadReceipts(path string) (map[string]map[int64]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	found := map[string]map[int64]string{}
	for number, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		if field := "audit-receipt:"; len(line) >= len(field) && strings.EqualFold(line[:len(field)], field) {
			line = strings.TrimSpace(line[len(field):])
		}
		if line == "" {
			continue
		}
		parts := receipt.FindStringSubmatch(line)
		if parts == nil {
			return nil, fmt.Errorf("%s, line %d: not an Audit-Receipt value", path, number+1)
		}
		leaf, err := base64.StdEncoding.DecodeString(parts[3])
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, number+1, err)
		}
		if found[parts[1]] == nil {
			found[parts[1]] = map[int64]string{}
		}
		n, _ := strconv.ParseInt(parts[2], 10, 64)
		if known, there := found[parts[1]][n]; there && known != hex.EncodeToString(leaf) {
			return nil, fmt.Errorf("E_FORK %s/%d: two receipts name different records here, so two histories were told", parts[1], n)
		}
		found[parts[1]][n] = hex.EncodeToString(leaf)
	}
	return found, nil
}

// ---- the whole export ------------------------------------------------------------------------------------------------

type report struct {
	findings []*bad
	logs     []string
	records  map[string]int64
	roots    map[string]string
	anchored bool
}

func (r *report) status() int {
	status := 0
	for _, f := range r.findings {
		if strings.HasPrefix(f.code, "E_") {
			return 1
		}
		if strings.HasPrefix(f.code, "U_") {
			status = 2
		}
	}
	return status
}

type export struct {
	base     string
	trust    *trust
	receipts map[string]map[int64]string
	held     *checkpoint
	report   *report
	root     *rootLog
	chains   map[string]*chain
}

func (e *export) read(name string) ([]byte, *bad) {
	data, err := os.ReadFile(filepath.Join(e.base, name))
	if err != nil {
		return nil, fail("E_MISSING", e.trust.origin+"/"+name, "the file is missing")
	}
	return data, nil
}

var noChain = regexp.MustCompile(`^(tile|g[0-9]+)$`)

func (e *export) check() {
	rootFindings := e.readRoot()
	var logs []string
	listed, _ := os.ReadDir(e.base)
	for _, entry := range listed {
		if info, err := os.Stat(filepath.Join(e.base, entry.Name())); err == nil && info.IsDir() && !noChain.MatchString(entry.Name()) {
			logs = append(logs, e.trust.origin+"/"+entry.Name())
		}
	}
	slices.Sort(logs)
	for _, log := range slices.Sorted(maps.Keys(e.receipts)) {
		if !slices.Contains(logs, log) {
			e.add(fail("E_MISSING", log, "a receipt knows this chain; the export lacks it"))
		}
	}
	if len(logs) == 0 && len(e.report.findings) == 0 {
		e.add(fail("E_MISSING", e.trust.origin, "the export holds no chain of this origin"))
	}
	for _, log := range logs {
		e.checkChain(log)
	}
	for _, problem := range rootFindings {
		e.add(problem)
	}
	if e.root == nil {
		e.root = &rootLog{origin: e.trust.origin}
	}
	e.compare()
	e.compareMarks(logs)
	if len(rootFindings) == 0 && e.root.later == 0 {
		e.compareTenants()
	}
	unanchored := slices.DeleteFunc(slices.Clone(logs), func(log string) bool { return len(e.receipts[log]) > 0 })
	if e.report.anchored || (len(unanchored) == 0 && len(logs) > 0) {
		e.report.anchored = true
		return
	}
	if len(unanchored) == len(logs) {
		unanchored = []string{e.trust.origin}
	}
	for _, log := range unanchored {
		e.add(fail("U_NOANCHOR", log, "no receipt and no checkpoint of the auditor's: a cut end would not show"))
	}
}

func (e *export) add(problem *bad) { e.report.findings = append(e.report.findings, problem) }

func (e *export) readRoot() (found []*bad) {
	_, noTiles := os.Stat(filepath.Join(e.base, "tile"))
	_, noCheckpoint := os.Stat(filepath.Join(e.base, "checkpoint"))
	if noTiles != nil && noCheckpoint != nil {
		if e.held != nil || e.trust.quorum != nil {
			found = append(found, fail("E_MISSING", e.trust.origin, "the export holds no root log"))
		}
		return found
	}
	e.root = &rootLog{origin: e.trust.origin, previous: zero, newest: map[string]shard{}}
	if problem := e.readEntries(e.root); problem != nil {
		found = append(found, problem)
	}
	if e.root.later > 0 {
		e.add(fail("U_VERSION", e.trust.origin, "%d entries of a later version than 1", e.root.later))
	}
	e.root.complete = len(found) == 0
	if problem := e.readCheckpoints(e.root); problem != nil {
		found = append(found, problem)
	}
	return found
}

func (e *export) readEntries(r *rootLog) *bad {
	size, problem := storedSize(e.base, r.origin)
	if problem != nil {
		return problem
	}
	source := entries{directory: e.base, log: r.origin, count: size}
	for range source.count {
		entry, problem := source.take()
		if problem == nil {
			problem = r.check(entry)
		}
		if problem != nil {
			return problem
		}
	}
	return r.tree.checkTiles(e.base, r.origin)
}

func (e *export) checkChain(log string) {
	committed := map[int64]commitment{}
	if e.root != nil {
		for _, h := range e.root.heads {
			for _, s := range h.shards {
				if _, known := committed[s.size]; s.log == log && !known {
					committed[s.size] = commitment{s.root, h.seq}
				}
			}
		}
	}
	wanted := e.receipts[log]
	c := newChain(log, e.trust.keys, committed, wanted)
	e.chains[log] = c
	directory := filepath.Join(e.base, filepath.Base(log))
	if _, err := os.Stat(filepath.Join(directory, "pruned.json")); err == nil {
		e.add(fail("U_PRUNED", log+"/0", "begins in an archive: nothing of this chain is checked here"))
		return
	}
	problem := c.run(directory)
	e.report.logs = append(e.report.logs, log)
	e.report.records[log] = c.n
	if problem != nil {
		e.add(problem)
		return
	}
	root := c.tree.root(c.n)
	e.report.roots[log] = hex.EncodeToString(root[:])
	if c.later > 0 {
		e.add(fail("U_VERSION", log, "%d records of a later version than 1", c.later))
	}
	for number, leaf := range wanted {
		if number >= c.n {
			e.add(fail("E_TRUNC", c.at(c.n), "a receipt names record %d", number))
		} else if c.leaves[number] != leaf {
			e.add(fail("E_RECEIPT", c.at(number), "the record is not the one the receipt was given for"))
		}
	}
}

// compare asks that every chain the root log names is there, and as long.
func (e *export) compare() {
	for _, log := range slices.Sorted(maps.Keys(e.root.newest)) {
		c, size := e.chains[log], e.root.newest[log].size
		if c == nil {
			e.add(fail("E_MISSING", log, "the root log committed %d records of it", size))
		} else if c.good && c.n < size {
			e.add(fail("E_TRUNC", c.at(c.n), "the root log committed %d records", size))
		}
	}
}

// compareMarks holds what records say they saw of the root log against it.
func (e *export) compareMarks(logs []string) {
	for _, log := range logs {
		c := e.chains[log]
		if !c.good {
			continue
		}
		for _, m := range c.marks {
			switch {
			case e.root.tree.n == 0:
				e.add(fail("E_MISSING", e.root.origin, "record %s saw a checkpoint of %d entries; no root log is here", c.at(m.at), m.size))
				return
			case m.size > e.root.tree.n && e.root.complete:
				e.add(fail("E_TRUNC", fmt.Sprintf("%s/%d", e.root.origin, e.root.tree.n), "record %s saw a checkpoint of %d entries",
					c.at(m.at), m.size))
				return
			case m.size <= e.root.tree.n:
				if root := e.root.tree.root(m.size); hex.EncodeToString(root[:]) != m.root {
					e.add(fail("E_FORK", c.at(m.at), "the record saw another root of the root log at %d entries", m.size))
					return
				}
			}
		}
	}
}

// compareTenants holds the map of the tenants' heads at each entry of the root log against the chains.
func (e *export) compareTenants() {
	tenants := &tenantMap{heads: map[string]map[string]head{}}
	for _, entry := range e.root.heads {
		for _, s := range entry.shards {
			c := e.chains[s.log]
			if c == nil || c.moved[s.size] == nil {
				return // said already
			}
			tenants.move(s.log, c.moved[s.size])
		}
		root := tenants.top.root()
		if hex.EncodeToString(root[:]) != entry.tenants {
			e.add(fail("E_TMAP", fmt.Sprintf("%s/%d", e.root.origin, entry.seq), "the map of the tenants' heads has another root"))
			return
		}
	}
}

func (r *report) json() string {
	type finding struct {
		Code  string `json:"code"`
		Where string `json:"where"`
		Why   string `json:"why"`
	}
	type log struct {
		Records int64   `json:"records"`
		Root    *string `json:"root"`
	}
	shown := struct {
		Anchored bool           `json:"anchored"`
		Findings []finding      `json:"findings"`
		Logs     map[string]log `json:"logs"`
		Records  int64          `json:"records"`
		Verdict  string         `json:"verdict"`
	}{r.anchored, []finding{}, map[string]log{}, 0, []string{"intact", "tampered", "cannot tell"}[r.status()]}
	for _, f := range r.findings {
		shown.Findings = append(shown.Findings, finding{f.code, f.where, f.why})
	}
	for _, name := range r.logs {
		l := log{Records: r.records[name]}
		if root, ok := r.roots[name]; ok {
			l.Root = &root
		}
		shown.Logs[name] = l
		shown.Records += l.Records
	}
	made, err := json.MarshalIndent(shown, "", "  ")
	if err != nil {
		panic(err)
	}
	return string(made)
}

func run(arguments []string) (int, error) {
	options, directory, asJSON, acceptUnanchored := map[string]string{}, "", false, false
	for i := 0; i < len(arguments); i++ {
		switch a := arguments[i]; {
		case a == "--json":
			asJSON = true
		case a == "--accept-unanchored":
			acceptUnanchored = true
		case slices.Contains([]string{"--trust", "--receipts", "--checkpoint", "--policy"}, a) && i+1 < len(arguments):
			i++
			options[a] = arguments[i]
		case directory == "" && !strings.HasPrefix(a, "-"):
			directory = a
		default:
			return 3, fmt.Errorf("%q: usage: skms-go-verify DIR --trust FILE [--receipts FILE] [--checkpoint FILE] "+
				"[--policy FILE] [--accept-unanchored] [--json]", a)
		}
	}
	if info, err := os.Stat(directory); err != nil || !info.IsDir() || options["--trust"] == "" {
		return 3, errors.New("needs a directory and --trust FILE")
	}
	t, err := loadTrust(options["--trust"])
	if err != nil {
		return 3, err
	}
	e := &export{base: filepath.Join(directory, t.origin), trust: t, chains: map[string]*chain{},
		report: &report{records: map[string]int64{}, roots: map[string]string{}}}
	if path := options["--policy"]; path != "" {
		if err := t.loadPolicy(path); err != nil {
			return 3, err
		}
	}
	if path := options["--receipts"]; path != "" {
		if e.receipts, err = loadReceipts(path); err != nil {
			return 3, err
		}
	}
	if path := options["--checkpoint"]; path != "" {
		data, err := os.ReadFile(path)
		if err == nil {
			e.held, err = openCheckpoint(data, t)
		}
		if err != nil {
			return 3, err
		}
	}
	e.check()
	if acceptUnanchored {
		e.report.findings = slices.DeleteFunc(e.report.findings, func(f *bad) bool { return f.code == "U_NOANCHOR" })
	}
	show(e.report, asJSON)
	return e.report.status(), nil
}

func show(r *report, asJSON bool) {
	if asJSON {
		fmt.Println(r.json())
		return
	}
	for _, f := range r.findings {
		fmt.Println(f)
	}
	for _, log := range r.logs {
		if r.status() == 0 {
			fmt.Printf("intact %s: %d records, root %s\n", log, r.records[log], r.roots[log])
		}
	}
}

func main() {
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "skms-go-verify: %v\n", err)
	}
	os.Exit(status)
}
