
function Stop-Step([int]$status, [string]$why) {
  $e = [System.Exception]::new($why)
  $e.Data['status'] = $status
  throw $e
}
function Test-File([string]$path) { return [System.IO.File]::Exists($path) }
function Get-Tree([string]$stage, [string]$path) {
  return [System.IO.Path]::Combine($RUN, $stage, $path.Replace(':', ''))
}
function Get-Parts([string]$item) {
  $i = $item.IndexOf(':')
  return @($item.Substring(0, $i), $item.Substring($i + 1))
}
function Get-Text([string]$path) {
  if (-not (Test-File $path)) { return '' }
  return [System.IO.File]::ReadAllText($path)
}
function Get-BytesHash([byte[]]$bytes) {
  $sha = [System.Security.Cryptography.SHA256]::Create()
  try { return [System.BitConverter]::ToString($sha.ComputeHash($bytes)).Replace('-', '') } finally { $sha.Dispose() }
}

$RUN = $argv[0]
foreach ($item in @($argv | Select-Object -Skip 1)) {
  $stage, $path = Get-Parts $item
  $kept = Get-Tree 'old' $path
  if ($stage -eq 'renewed') {
    if ((Test-File $kept) -or -not (Test-File $path)) { continue }
    'no ' + $path
    return
  }
  if ($stage -eq 'back') {
    if (-not (Test-File $kept)) { continue }
    'no ' + $path
    return
  }
  $from = Get-Tree $stage $path
  if (-not (Test-File $from) -or -not (Test-File $path) -or (Get-BytesHash ([System.IO.File]::ReadAllBytes($from))) -ne (Get-BytesHash ([System.IO.File]::ReadAllBytes($path)))) {
    'no ' + $path
    return
  }
}
'yes'
