
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

$holder = [System.IO.Path]::Combine($argv[0], 'holder')
if ((Get-Text $holder) -ceq $argv[1]) {
  [System.IO.File]::Delete($holder)
  [System.IO.File]::Delete([System.IO.Path]::Combine($argv[0], 'who'))
}
